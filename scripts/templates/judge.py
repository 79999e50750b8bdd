"""Whether what the kit makes of a conversation is right, by transformers' rendering, difference and generation marks.

The judge shares no code with dataset/chat.py and dataset/template.py, so it cannot repeat their mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts.templates.oracle import OPENING, Oracle, Reference
from scripts.templates.turns import Turns
from scripts.templates.words import Messages, Tools, at_leaf

RIGHT, SPOKEN, WRONG = "right", "spoken of", "wrong"
IN_OTHER_WORDS = "asks for answers in other words"
SAYS = {
    "content": r"content|text|answer|reasoning|think",
    "reasoning": r"reason|think",
    "call": r"call|argument",
    "result": r"result|tool",
    "system": r"system",
    "tools": r"tool",
}


@dataclass
class Verdict:
    kind: str = RIGHT
    wrong: list[str] = field(default_factory=list)
    spoken: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)  # named ones, which are no fault
    code: str = ""  # of a refusal
    impossible: bool = False  # refused, and transformers cannot render it either


def turns_to_train(messages: Messages, wishes: dict[int, bool], train_on: str) -> list[int]:
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = answers[-1:] if train_on == "last" else answers
    return [number for number in answers if wishes.get(number, number in wanted)]


def judge(oracle: Oracle, conversation: Any, train_on: str, result: Any) -> Verdict:
    """`result` is a list of samples, or the error by which the row was refused."""
    verdict = Verdict()
    messages, tools = conversation.messages, conversation.tools
    trained = turns_to_train(messages, conversation.wishes, train_on)
    if isinstance(result, Exception):
        verdict.code = getattr(result, "code", type(result).__name__)
        verdict.kind, verdict.spoken = SPOKEN, [f"{verdict.code}: {result}"]
        if not str(result).strip():
            verdict.kind, verdict.wrong = WRONG, ["refused without a reason"]
        verdict.impossible = not oracle.references(messages[: trained[-1] + 1], tools)
        return verdict
    if not oracle.references(messages[: trained[-1] + 1], tools):
        verdict.wrong.append(f"trained although transformers cannot render it: {oracle.why}")
    else:
        seen: list[int] = []
        for sample in result:
            Judgement(oracle, messages, tools, trained, sample, verdict, seen).run()
        if not verdict.wrong:
            verdict.wrong += [
                f"turn {turn} is trained {seen.count(turn)} times" for turn in trained if seen.count(turn) != 1
            ]
    verdict.wrong = list(dict.fromkeys(verdict.wrong))
    verdict.kind = WRONG if verdict.wrong else SPOKEN if verdict.spoken else RIGHT
    return verdict


class Judgement:
    """One sample against the rendering of the messages up to its last turn."""

    def __init__(
        self, oracle: Oracle, messages: Messages, tools: Tools, trained: list[int], sample: Any, verdict: Verdict,
        seen: list[int],
    ):  # fmt: skip
        self.oracle, self.all, self.tools, self.trained = oracle, messages, tools, trained
        self.sample, self.verdict, self.seen = sample, verdict, seen
        self.ids, self.mask = [int(number) for number in sample.ids], [bool(flag) for flag in sample.supervised]

    def run(self) -> None:
        found = self._find_reference()
        if found is None:
            return
        self.last, self.reference, self.spans, self.tail = found
        self.messages = self.all[: self.last + 1]
        self.turns = Turns(self.oracle, self.all, self.reference)
        self.data, self.wrote = self.reference.data, self.reference.wrote
        self.supervised = np.zeros(len(self.data) + 1, dtype=bool)
        for (start, end), flag in zip(self.spans, self.mask, strict=False):
            self.supervised[start:end] = flag
        self.covered = self.spans[-1][1] if self.spans else 0
        self.own = {place for places in self.reference.said.values() for place in places}
        self._check_ids()
        self._check_forgery()
        self._check_mask()
        self._check_missing()

    def wrong(self, reason: str) -> None:
        self.verdict.wrong.append(reason)

    def _find_reference(self) -> tuple[int, Reference, list[tuple[int, int]], list[int]] | None:
        best: tuple[int, str] = (-1, "no rendering to compare with")
        for last in self.trained:
            for reference in self.oracle.references(self.all[: last + 1], self.tools):
                spans, tail = self.oracle.align(self.ids, reference.data)
                place = spans[-1][1] if spans else 0
                written = [places[-1] for places in reference.wrote.values() if places]
                if len(tail) <= 4 and place > max(written, default=-1):
                    return last, reference, spans, tail
                ours = b"".join(map(self.oracle.piece, tail[:20]))[:60].decode(errors="replace")
                theirs = reference.data[place : place + 60].decode(errors="replace")
                best = max(best, (place, f"text: {ours!r}, in transformers {theirs!r}"))
        self.wrong(best[1])
        return None

    # ---- ids

    def _check_ids(self) -> None:
        ids = self.oracle.tokenizer(self.reference.text, add_special_tokens=False)["input_ids"]
        spans, rest = self.oracle.align(ids, self.data)
        if rest:
            self.verdict.differences.append("the tokenizer does not keep the text")
            return
        theirs = {(n, *span) for n, span in zip(ids, spans, strict=True) if span[0] < self.covered}
        ours = {(n, *span) for n, span in zip(self.ids, self.spans, strict=False)}
        for start, end in _regions([span[1:] for span in ours ^ theirs]):
            missing = [n for n, a, b in theirs - ours if start <= a and b <= end and n in self.oracle.added]
            text = self.data[start:end].decode(errors="replace")
            if any(place in self.own for place in range(start, end)) and missing:
                self._check_letters(start, end, missing)
            elif not self._is_border(start, end):
                self.wrong(f"ids: {text!r} is not encoded as by transformers")
            else:
                self.verdict.differences.append("prompt and answer are encoded apart")

    def _is_border(self, start: int, end: int) -> bool:
        """Whether an answer begins or ends there, trained or not, beside white space."""
        flags = np.append(self.supervised, False)
        if not self.data[start:end].strip() and any(begin <= start and end <= stop for begin, stop in self._gaps()):
            return True
        for place in range(start, min(end, self.covered) + 1):
            before = flags[place - 1] if place else False
            beside = self.data[max(place - 1, 0) : place + 1]
            if before != flags[place] and (not beside or any(chr(b).isspace() for b in beside)):
                return True
        return False

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """What stands between the text of each answer and those of its neighbours."""
        for turn, message in enumerate(self.messages):
            if message["role"] == "assistant" and self.wrote[turn]:
                yield self.reference.before(turn), self.wrote[turn][0]
                yield self.wrote[turn][-1] + 1, self.reference.after(turn)

    def _check_letters(self, start: int, end: int, missing: list[int]) -> None:
        """Marks of turns that a text spells are letters; an answer's other tokens are the model's own."""
        for number, message in enumerate(self.messages):
            if message["role"] == "assistant" and any(start <= place < end for place in self.wrote[number]):
                for token in (self.oracle.added[n].content for n in missing if n not in self.oracle.structure):
                    if token in str(self.oracle.tokenizer.chat_template):
                        self.wrong(f"ids: {token!r} in an answer is letters, in transformers a token")
        self.verdict.differences.append("what a text spells stays letters")

    def _check_forgery(self) -> None:
        for at, (number, span) in enumerate(zip(self.ids, self.spans, strict=False)):
            token = self.oracle.added.get(number)
            if token is None or not (token.special or number in self.oracle.structure):
                continue
            writers = [n for n, places in self.wrote.items() if any(place in places for place in range(*span))]
            answers = all(self.messages[n]["role"] == "assistant" for n in writers)
            if writers and not (answers and number not in self.oracle.structure):
                self.wrong(f"forged: {token.content!r} (token {at}) comes out of a text")

    # ---- mask

    def _check_mask(self) -> None:
        allowed = np.zeros(len(self.data) + 1, dtype=bool)
        for turn, message in enumerate(self.messages):
            flags = self.supervised[self.wrote[turn]]
            if message["role"] == "assistant" and turn in self.trained and flags.any():
                self.seen.append(turn)
                if not flags.all():
                    self.wrong(f"mask: {self._excerpt(turn, flags)!r} of turn {turn} is not trained")
                    return
                begin, end = self._run_of(turn)
                self._check_stretch(turn, begin, end)
                self._check_stable(turn)
                allowed[begin:end] = True
            elif flags.any():
                self.wrong(f"mask: trained although of {message['role']} {turn}: {self._excerpt(turn, ~flags)!r}")
        for place in np.flatnonzero(self.supervised & ~allowed)[:1]:
            text = self.data[place : place + 30].decode(errors="replace")
            self.wrong(f"mask: trained outside of the turns: {text!r}")

    def _excerpt(self, turn: int, flags: np.ndarray) -> str:
        places = [place for place, flag in zip(self.wrote[turn], flags, strict=True) if not flag]
        return self.data[places[0] : places[-1] + 1][:30].decode(errors="replace")

    def _run_of(self, turn: int) -> tuple[int, int]:
        """The run of supervised bytes around what a turn wrote; ends at the first hole."""
        begin, end = self.wrote[turn][0], self.wrote[turn][-1] + 1
        hole = np.flatnonzero(~self.supervised[begin:end])
        if len(hole):
            self.wrong(f"mask: a hole in turn {turn}: {self.data[begin + hole[0] :][:20].decode(errors='replace')!r}")
        while begin and self.supervised[begin - 1]:
            begin -= 1
        while self.supervised[end]:
            end += 1
        return begin, end

    def _check_stretch(self, turn: int, begin: int, end: int) -> None:
        first, last = self.wrote[turn][0], self.wrote[turn][-1] + 1
        before = self.reference.before(turn)
        prompt = self.turns.prompt_tail(turn)
        gap = self.data[before:first]
        latest = self.turns.shared(gap, prompt)
        twin = self._twin_span(turn)
        opening = OPENING.search(gap[:latest].decode(errors="replace"))
        start = len(gap[:latest].decode(errors="replace")[: opening.start()].encode()) if opening else latest
        if twin and self.oracle.marks_itself and begin == twin[0]:
            pass  # its authors want it so
        elif (
            begin < before + start
            and self.data[begin : before + start].strip()
            or self._has_header(gap[:latest], begin, first)
        ):
            self.wrong(f"mask: the header is trained: {self._text(begin, first)!r}")
        latest = max(latest, twin[0] - before) if twin else latest
        if begin > before + latest and self.data[before + latest : begin].strip():
            self._check_other_words(before + latest, begin)
        self._check_end(turn, last, end)
        if twin:
            self._compare(turn, begin, end, *twin)

    def _has_header(self, shared: bytes, begin: int, first: int) -> bool:
        """Whether a header is trained that stands behind what is shared with the prompt."""
        header = self.oracle.header().strip().encode()
        return bool(header) and header not in shared and header in self.data[begin:first]

    def _check_other_words(self, start: int, begin: int) -> None:
        """What is not trained and not in the prompt has to be a header that the conversation words differently."""
        left_out = self.data[start:begin].decode(errors="replace")
        header = self.oracle.header()
        noted = [note for note in getattr(self.sample, "notes", ()) if IN_OTHER_WORDS in note]
        if noted and header and left_out.endswith(header) and not any(p in self.own for p in range(start, begin)):
            self.verdict.spoken.append(f"noted: {noted[0]}")
        else:
            self.wrong(f"mask: not trained, and not in the prompt: {self._text(start, begin)!r}")

    def _check_end(self, turn: int, last: int, end: int) -> None:
        """Supervision has to reach what ends the turn, and what it says after that is white space."""
        needed = self.turns.end(turn, turn == self.last)
        if turn != self.last:
            tail, ours = self.data[last : self.reference.after(turn)], end - last
            wanted = len(needed) if tail.startswith(needed) else 0
            if not wanted:
                self.wrong(f"mask: turn {turn} does not end with {needed.decode(errors='replace')!r}")
        else:
            kept = self.data[last : self.covered]  # the sample may end before the rendering does
            tail = kept + b"".join(map(self.oracle.piece, self.tail)) if self.tail else self.turns.after(turn)[0]
            ours = end - last + (len(tail) - len(kept) if self.tail and all(self.mask[-len(self.tail) :]) else 0)
            if not tail.startswith(needed):
                shown = (needed.decode(errors="replace"), tail.decode(errors="replace"))
                self.wrong(f"end: the last turn has no end {shown[0]!r}, it ends with {shown[1]!r}")
                return
            if self.tail:
                self.verdict.differences.append("the last turn, which the template leaves open, gets its end")
            wanted = len(needed)
        if ours < wanted:
            self.wrong(f"end: not trained: {tail[ours:wanted].decode(errors='replace')!r} after turn {turn}")
        elif self.turns.marks(tail[wanted:ours]) and turn == self.last:
            self.verdict.differences.append("the end of the whole text is trained after the end of the turn")
        elif self.turns.marks(tail[wanted:ours]):
            self.wrong(f"end: trained beyond its end: {tail[wanted:ours].decode(errors='replace')!r} after turn {turn}")

    def _check_stable(self, turn: int) -> None:
        """A turn that is trained in the middle has to read as it did when the model had to write it."""
        if turn == self.last:
            return
        said = self.all[: turn + 1]
        text = self.turns.render(said) or ""
        places = [self.turns.places(text, said, number) for number in range(turn + 1)]
        if not (own := places.pop()):
            return
        begin, end = max((p[-1] + 1 for p in places if p), default=0), own[-1] + 1
        here, stop = self.reference.before(turn), self.wrote[turn][-1] + 1
        unclosed = self.turns.unclosed(turn)
        if text.encode()[begin:end] != self.data[here:stop] or not text.encode().startswith(unclosed, end):
            shown = self._text(here, stop + len(unclosed)), text.encode()[begin:].decode(errors="replace")
            self.wrong(f"mask: turn {turn} is trained as later turns rewrite it: {shown[0]!r} instead of {shown[1]!r}")

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end][:80].decode(errors="replace")

    # ---- the generation marks

    def _twin_span(self, turn: int) -> tuple[int, int] | None:
        """What the twin marks as said in a turn, where it writes the same text."""
        if self.oracle.twin is None:
            return None
        try:
            text, spans = self.oracle.twin_spans(self.messages, self.reference.tools, self.reference.way)
        except Exception as error:
            self.verdict.differences.append(f"the twin cannot render it: {type(error).__name__}")
            return None
        if text != self.reference.text:
            self.verdict.differences.append("the twin writes another text")
            return None
        own = self.wrote[turn]
        mine = [span for span in spans if any(span[0] <= place < span[1] for place in own)]
        return (min(a for a, _ in mine), max(b for _, b in mine)) if mine else None

    def _compare(self, turn: int, begin: int, end: int, start: int, stop: int) -> None:
        header, rest = self.data[start:begin].decode(errors="replace"), self.data[end:stop].decode(errors="replace")
        if header.strip():
            if OPENING.match(header):
                self.wrong(f"twin: not trained: {header!r} before turn {turn}")
            else:
                self.verdict.differences.append("the generation marks take in the header")
        elif header:
            self.verdict.differences.append("the generation marks take in white space before the answer")
        if early := self.data[begin:start].decode(errors="replace"):
            if early.strip():
                self.wrong(f"twin: trained before its marks: {early!r} before turn {turn}")
            else:
                self.verdict.differences.append("the generation marks leave out white space before the answer")
        if rest:
            what = "text" if rest.strip() else "white space"
            self.verdict.differences.append(f"the generation marks take in {what} after the end of the turn")
        if late := self.data[stop:end].decode(errors="replace"):
            self.verdict.differences.append(f"the generation marks leave out the end of the turn, {late!r}")

    # ---- what is gone

    def _check_missing(self) -> None:
        notes = getattr(self.sample, "notes", ())
        for leaf in self.reference.missing:
            kind = leaf[1]
            value = str(at_leaf(self.messages, self.reference.tools, leaf))
            where = "the tools" if leaf[0] < 0 else f"message {leaf[0]}"
            if kind == "content" and self.messages[leaf[0]]["role"] == "assistant" and "<think>" in value:
                kind = "reasoning"
            if told := [f"noted: {note}" for note in notes if re.search(SAYS[kind], note.lower())]:
                self.verdict.spoken += told
            elif not self._elsewhere(leaf):
                self.wrong(f"gone: {kind} {value[:30]!r} of {where}")

    def _elsewhere(self, leaf: Any) -> bool:
        """Whether another sample of this row has it, because it trains that turn."""
        turn = leaf[0]
        if turn not in self.trained or turn >= self.last or turn in self.seen[-1:]:
            return False
        references = self.oracle.references(self.all[: turn + 1], self.tools)
        return bool(references) and leaf not in references[0].missing


def _regions(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch or overlap, as one each."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged
