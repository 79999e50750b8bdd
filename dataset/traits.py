"""What a chat template does with a conversation, found by rendering small ones that differ in one thing.

No template says where the header of an answer ends, what closes a turn, or which parts of a message it leaves out. It
shows all of that in its renderings: what stays while the words of the messages change is the template's own.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dataset.errors import RowError
from dataset.reader import Message
from dataset.template import PROBE, ChatTemplate, Form, Request, common_prefix

USER, ANSWER = (message["content"] for message in PROBE)
NEXT_USER, NEXT_ANSWER, REASONING, SYSTEM = "Numbat", "Dingo", "Echidna", "Platypus"
NAME, VALUE, RESULT = "bilby", "Kookaburra", "Cassowary"
PARAMETERS = {
    "type": "object",
    "properties": {"nest": {"type": "string", "description": "Where."}},
    "required": ["nest"],
}
TOOLS = [{"type": "function", "function": {"name": NAME, "description": "Finds one.", "parameters": PARAMETERS}}]

CALL: Message = {
    "role": "assistant", "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": {"nest": VALUE}}}
    ],
}  # fmt: skip
CALLED = [PROBE[0], CALL, {"role": "tool", "tool_call_id": "call00001", "name": NAME, "content": RESULT}, PROBE[1]]
TWO_TURNS = [*PROBE, {"role": "user", "content": NEXT_USER}, {"role": "assistant", "content": NEXT_ANSWER}]
INSTRUCTED = [{"role": "system", "content": SYSTEM}, *PROBE]
THOUGHT = {"reasoning_content": REASONING}
MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")  # what looks like a token, also where the tokenizer has none
TAG = re.compile(r"</?[\w:]+>")  # of the model's own tokens that a template only mentions; with bars it may end a turn
FORMS = [(arguments, silence) for arguments in ("object", "text") for silence in ("empty", "null", "absent")]


@dataclass(frozen=True)
class Ending:
    """What closes a turn. Where the turn is the last, `rest` follows, and the end of `mark` may be `missing`."""

    mark: str
    rest: str = ""
    missing: str = ""
    token: str = ""  # the last control token of the mark, or all of a mark that has none


@dataclass(frozen=True)
class Traits:
    """What is true of all conversations of a template that come with (or without) tools and with the same variables."""

    form: Form = Form()
    header: str = ""  # the end of the generation prompt, from its last control token on, without what follows here
    thinking: str = ""  # the part of the generation prompt that opens a think block, and belongs to the answer
    openings: tuple[str, ...] = ()  # other ends of the generation prompt that some answers lack, shortest first
    answer: Ending | None = None  # what closes an answer
    call: Ending | None = None  # and a message that calls tools
    structural: frozenset[str] = frozenset()  # the control tokens of roles, headers and ends
    own: frozenset[str] = frozenset()  # the others that the template knows, which an answer's text may hold
    writes: frozenset[str] = frozenset()  # names of kinds of content, see _written
    marks: bool = False  # the generation tags of the template enclose what the assistant says
    problem: str | None = None  # why not even a question and its answer can be rendered

    @cached_property
    def own_tokens(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.own))) or r"(?!)")

    def ending(self, message: Message) -> Ending | None:
        return self.call if self.call and message.get("tool_calls") else self.answer


class Probe:
    """Renders small conversations and remembers them; None stands for one that the template refuses."""

    def __init__(self, template: ChatTemplate, request: Request, control: re.Pattern[str]):
        self._template, self.request, self.control = template, request, control
        self._texts: dict[str, str | None] = {}
        self.problem: str | None = None  # the first that the template had

    def text(self, messages: list[Message], prompt: bool = False, request: Request | None = None) -> str | None:
        request = request or self.request
        key = json.dumps([messages, prompt, str(request)])
        if key not in self._texts:
            try:
                self._texts[key] = self._template.render(messages, request, prompt)
            except RowError as error:
                self._texts[key], self.problem = None, self.problem or str(error)
        return self._texts[key]

    def turns(self) -> Iterator[tuple[list[Message], Message, str, str]]:
        """(messages up to an answer, the answer, the prompt for it, the text with it) in several places and kinds."""
        for before in (PROBE[:1], TWO_TURNS[:3], CALLED[:3]):
            for answer in (PROBE[1], {**PROBE[1], **THOUGHT}, CALL, {**CALL, **THOUGHT}):
                prompt, text = self.text(before, prompt=True), self.text([*before, answer])
                if prompt is not None and text is not None and (VALUE if "tool_calls" in answer else ANSWER) in text:
                    yield before, answer, prompt, text

    def prompts(self, before: list[Message]) -> Iterator[str]:
        """What follows these messages as an answer is asked for, with thinking on and off, and where one was given."""
        texts = [self.text(before, prompt=True), self.text([*before, PROBE[1]]), self.text([*before, CALL])]
        for name in sorted(self._template.switches(self.request.tools) - self.request.variables.keys()):
            for value in (True, False):
                request = Request(self.request.tools, {**self.request.variables, name: value}, self.request.form)
                texts.append(self.text(before, prompt=True, request=request))
        said = before[-1]["content"]
        yield from (_after(text, said) for text in texts if text is not None and said in text)

    def agree(self, one: str, other: str) -> int:
        """Length of what two texts begin with alike; it ends inside no control token, nor in what looks like one."""
        length = common_prefix(one, other)
        for text in (one, other):
            for pattern in (self.control, MARK):
                for match in pattern.finditer(text, max(0, length - 200)):
                    if match.start() < length < match.end():
                        length = match.start()
        return length

    def tokens(self, text: str | None) -> list[str]:
        """The control tokens in a text."""
        return self.control.findall(text or "")

    def through_last(self, text: str) -> str:
        """The text to the end of its last control token; empty where it has none."""
        ends = [match.end() for match in self.control.finditer(text)]
        return text[: ends[-1]] if ends else ""

    def through_first(self, text: str) -> str:
        match = self.control.search(text)
        return text[: match.end()] if match else ""

    def heads(self, text: str) -> set[str]:
        """The control tokens with which a text begins: what opens a conversation neither ends nor opens an answer."""
        found, at = set(), 0
        for match in self.control.finditer(text):
            if match.start() != at:
                break
            found.add(match[0])
            at = match.end()
        return found


def find_traits(
    template: ChatTemplate, with_tools: bool, variables: dict[str, Any], control: re.Pattern[str]
) -> Traits:
    """Renders the probes. `control` matches the control tokens of the tokenizer. Raises UnsafeDataError alone."""
    probe = Probe(template, Request(TOOLS if with_tools else None, variables), control)
    form = _find_form(probe)
    if form is None:
        return Traits(problem=probe.problem or f"the template does not write the answer: {probe.text(PROBE)!r}")
    probe.request = Request(probe.request.tools, variables, form)
    plain = probe.text(PROBE) or ""
    answer = _ending_of_answers(probe, plain)
    call = _ending_of_calls(probe, answer)
    thinking, openings = _openings(probe, plain)
    header = _header(probe, [thinking, *openings])
    structural = {*_structural(probe, plain, (answer, call), thinking, header), *template.special_tokens}
    own = {
        *_inside(probe, probe.heads(plain)),
        *filter(TAG.fullmatch, probe.tokens(template.source(probe.request.tools))),
    }
    return Traits(
        form, header, thinking, openings, answer, call, frozenset(structural),
        frozenset(own - structural), frozenset(_written(probe)), _marks_hold(template, probe.request),
    )  # fmt: skip


def _marks_hold(template: ChatTemplate, request: Request) -> bool:
    """Whether the generation tags enclose what the assistant says; inside a macro they do not know where they are."""
    for messages, words in ((PROBE, (ANSWER,)), (TWO_TURNS, (ANSWER, NEXT_ANSWER))):
        with contextlib.suppress(RowError):
            rendering = template.rendering(messages, request)
            marked = [rendering.text[start:end] for start, end in rendering.marked]
            if not all(any(word in text for text in marked) for word in words):
                return False
    return True


def _find_form(probe: Probe) -> Form | None:
    """The first form of messages in which their words appear, and not as Python shows a dictionary."""
    tools, variables = probe.request.tools, probe.request.variables

    def shows(messages: list[Message], form: Form, *words: str) -> str | None:
        text = probe.text(messages, request=Request(tools, variables, form))
        return text if text is not None and all(word in text for word in words) else None

    contents = [form for form in (Form(), Form("parts"), Form(no_tools="empty")) if shows(PROBE, form, USER, ANSWER)]
    if not contents:
        return None
    found = []
    for messages in (CALLED[:2], CALLED):
        for arguments, silence in FORMS:
            form = replace(contents[0], arguments=arguments, silence=silence)
            if text := shows(messages, form, NAME, VALUE):
                found.append((str({"nest": VALUE}) in text, form))
    return min(found, key=lambda pair: pair[0])[1] if found else contents[0]


def _after(text: str, word: str) -> str:
    return text[text.rindex(word) + len(word) :]


def _between(text: str | None, first: str, second: str) -> str | None:
    """What lies between two words, the nearest ones."""
    if text is None or second not in text or first not in text[: text.rindex(second)]:
        return None
    return _after(text[: text.rindex(second)], first)


# ---------------------------------------------------------------------------------------------------------------------
# Where a turn ends


def _ending_of_answers(probe: Probe, plain: str) -> Ending | None:
    last, middle = _after(plain, ANSWER), _between(probe.text(TWO_TURNS), ANSWER, NEXT_USER)
    if middle is None:
        return _ending(probe, probe.through_last(last) or last.rstrip(" "), last)
    mark = _mark_of(probe, last, middle, plain)
    if not mark:  # the next header is text: it closes the turn, without what stands before the first question too
        header = common_prefix(middle[::-1], plain[: plain.index(USER)][::-1]) if USER in plain else 0
        mark = middle[: len(middle) - header] or middle
    return _ending(probe, mark, last)


def _ending_of_calls(probe: Probe, answer: Ending | None) -> Ending | None:
    called, middle = probe.text(CALLED[:2]), _between(probe.text(CALLED), VALUE, RESULT)
    if called is None or NAME not in called or VALUE not in called:
        return None
    last = _after(called, VALUE)
    if middle is None:
        return _ending(probe, probe.through_last(last), last)
    if answer is not None:
        if answer.mark in last and answer.mark in middle:  # it ends as an answer does
            return _ending(probe, last[: last.index(answer.mark) + len(answer.mark)], last)
        if answer.missing and last[-len(NAME) :] + answer.missing in middle:  # and is left open as one
            return _ending(probe, last + answer.missing, last)
        common = last[: probe.agree(last, middle)]
        follows = probe.through_first(middle[len(common) :])
        if answer.missing and follows:  # what comes next ends the turn
            return _ending(probe, common + follows, last)
    return _ending(probe, _mark_of(probe, last, middle, called), last)


def _mark_of(probe: Probe, last: str, middle: str, text: str) -> str:
    """What follows a turn wherever it stands: to the last control token, or a text.

    Else what follows the last one of all, or one amid others. A template that writes the next header without being
    asked ends the last one so, too.
    """
    heads = probe.heads(text)
    common = last[: probe.agree(last, middle)]
    if len(common) < len(last):
        places = [match.start() for match in probe.control.finditer(common) if match[0] in heads]
        common = common[: places[0]] if places else common
    follows = probe.through_first(last[len(common) :])
    own = common + follows if follows and not heads.intersection(probe.tokens(follows)) else ""
    return probe.through_last(common) or own or probe.through_first(middle) or common.rstrip(" ")


def _ending(probe: Probe, mark: str, last: str) -> Ending | None:
    """The ending whose mark is given, where `last` follows the words of a turn that is the last."""
    shared, tokens = probe.agree(mark, last), probe.tokens(mark)
    if not mark or not (tokens or mark == last or mark[-1].isspace()):  # a piece of a word is no end
        return None
    return Ending(mark, rest=last[shared:], missing=mark[shared:], token=tokens[-1] if tokens else mark)


# ---------------------------------------------------------------------------------------------------------------------
# Where an answer begins


def _openings(probe: Probe, plain: str) -> tuple[str, tuple[str, ...]]:
    """Ends of the generation prompt that an answer need not have: of a think block, and all others.

    A prompt opens a think block where reasoning goes on at its end, and an answer without reasoning does not.
    """
    thinking, found, heads = "", set(), probe.heads(plain)
    for before, answer, prompt, text in probe.turns():
        shared = probe.agree(prompt, text)
        opening = prompt[shared:]
        if before[-1]["content"] not in prompt[:shared] or heads.intersection(probe.tokens(opening)):
            continue  # another text already before the answer
        if opening:
            found.add(opening)
        bare = probe.text([*before, PROBE[1]])
        if "tool_calls" not in answer and text.startswith(REASONING, shared) and bare is not None:
            at = min(shared, probe.agree(prompt, bare))
            if not bare.startswith(ANSWER, at):
                thinking = max(thinking, prompt[_last_word(probe, prompt[:shared]) :], key=len)
    return thinking, tuple(sorted(found - {thinking}, key=lambda text: (len(text), text)))


def _last_word(probe: Probe, text: str) -> int:
    """Where the last control token of a text begins, or what stands after it without a space inside."""
    marks = list(probe.control.finditer(text))
    if marks and not text[marks[-1].end() :].strip():
        return marks[-1].start()
    word = re.search(r"\S+\s*$", text)
    return max(word.start() if word else len(text), marks[-1].end() if marks else 0)


def _header(probe: Probe, openings: Iterable[str]) -> str:
    prompt = probe.text(PROBE[:1], prompt=True) or ""
    opening = max((opening for opening in openings if prompt.endswith(opening)), key=len, default="")
    prompt = prompt[: len(prompt) - len(opening)]
    marks = [match.start() for match in probe.control.finditer(prompt) if match.start() > prompt.rfind(USER)]
    return prompt[marks[-1] :] if marks else ""


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def _structural(
    probe: Probe, plain: str, endings: Iterable[Ending | None], thinking: str, header: str
) -> Iterator[str]:
    """The control tokens of headers and ends: those between what two speakers say."""
    yield from probe.heads(plain)
    yield from probe.tokens(_between(probe.text(TWO_TURNS), ANSWER, NEXT_USER))
    for ending in endings:
        yield from probe.tokens(ending.token if ending else None)
        to_result = _between(probe.text(CALLED), VALUE, RESULT) or ""
        if ending and to_result.startswith(ending.mark):
            yield from probe.tokens(to_result[len(ending.mark) :])
    for tools in (None, probe.request.tools):  # without tools, if that can be: instructions on tools spell tokens, too
        request = Request(tools, probe.request.variables, probe.request.form)
        bare, instructed = probe.text(PROBE, request=request), probe.text(INSTRUCTED, request=request)
        if bare is not None and instructed is not None and SYSTEM in instructed:
            yield from probe.tokens(instructed[probe.agree(bare, instructed) : instructed.index(SYSTEM)])
            yield from probe.tokens(_between(instructed, SYSTEM, USER))
            break
    for before in (PROBE[:1], CALLED[:3]):
        headers = list(probe.prompts(before))
        common = headers[0] if headers else ""
        for header in headers:
            common = common[: probe.agree(common, header)]
        yield from (token for token in probe.tokens(common) if token not in probe.tokens(thinking))
    yield from (token for token in probe.tokens(header) if not TAG.fullmatch(token))


def _inside(probe: Probe, heads: set[str]) -> Iterator[str]:
    """The control tokens inside answers; not those that end a part of one, before the header of the next part."""
    for _, _, prompt, text in probe.turns():
        inside = probe.tokens(text[probe.agree(prompt, text) :])
        yield from (token for token, after in zip(inside, [*inside[1:], ""], strict=False) if after not in heads)


def _written(probe: Probe) -> Iterator[str]:
    """What of a conversation the template writes somewhere."""
    for kind, messages, word in (
        ("system message", INSTRUCTED, SYSTEM),
        ("reasoning", [PROBE[0], {**PROBE[1], **THOUGHT}], REASONING),
        ("reasoning beside tool calls", [PROBE[0], {**CALL, **THOUGHT}], REASONING),
        ("tool calls", CALLED[:2], VALUE),
        ("tool calls", CALLED, VALUE),
        ("tool results", CALLED, RESULT),
        ("tools", PROBE, NAME),
    ):
        if word.lower() in (probe.text(messages) or "").lower():
            yield kind
