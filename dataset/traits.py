"""What a chat template does with a conversation, found by rendering small ones that differ in one thing.

No template says where the header of an answer ends, what closes a turn, or which parts of a message it leaves out. It
shows all of that in its renderings: what stays while the words of the messages change is the template's own.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dataset.files import RowError
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
THOUGHT = {"reasoning_content": REASONING}
FORMS = [Form(arguments=a, silence=s) for a in ("object", "text") for s in ("empty", "null", "absent")]


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
    thinking: str = ""  # the part of the generation prompt that opens a think block, and belongs to the answer
    header: str = ""  # the end of the generation prompt, from its last control token on, without both of these
    openings: tuple[str, ...] = ()  # other ends of the generation prompt that some answers lack, shortest first
    answer: Ending | None = None  # what closes an answer
    call: Ending | None = None  # and a message that calls tools
    own: frozenset[str] = frozenset()  # control tokens that an answer's text may hold
    structural: frozenset[str] = frozenset()  # those of roles, headers and ends
    writes: frozenset[str] = frozenset()  # names of kinds of content, see _written
    problem: str | None = None  # why not even a question and its answer can be rendered

    def ending(self, message: Message) -> Ending | None:
        return self.call if self.call and message.get("tool_calls") else self.answer


class Probe:
    """Renders probes of one kind and remembers them; None stands for a rendering that the template refuses."""

    def __init__(self, template: ChatTemplate, with_tools: bool, variables: dict[str, Any], control: re.Pattern[str]):
        self._template, self.control = template, control
        self.request = Request(TOOLS if with_tools else None, variables)
        self._texts: dict[str, str | None] = {}
        self.problem: str | None = None

    def text(self, messages: list[Message], prompt: bool = False, form: Form | None = None) -> str | None:
        form = form or self.request.form
        key = json.dumps([messages, prompt, str(form)])
        if key not in self._texts:
            request = Request(self.request.tools, self.request.variables, form)
            try:
                self._texts[key] = self._template.render(messages, request, prompt)
            except RowError as error:
                self._texts[key], self.problem = None, self.problem or str(error)
        return self._texts[key]

    def prompts(self, before: list[Message], answers: list[Message]) -> list[str]:
        """What asks for an answer, with every switch that the template knows on and off; and some answered."""
        texts = [self.text(before, prompt=True), *(self.text([*before, answer]) for answer in answers)]
        for name in sorted(self._template.switches(self.request.tools) - self.request.variables.keys()):
            for value in (True, False):
                request = Request(self.request.tools, {**self.request.variables, name: value}, self.request.form)
                with contextlib.suppress(RowError):
                    texts.append(self._template.render(before, request, generation_prompt=True))
        return [text for text in texts if text is not None and before[-1]["content"] in text]

    def inside(self) -> Iterator[str]:
        """The control tokens inside answers; none of those that end a part of one."""
        for before, answer, _, said in _turns():
            prompt, text = self.text(before, prompt=True), self.text([*before, answer])
            if prompt is not None and text is not None and said in text:
                yield from self.tokens(text[self.agree(prompt, text) :])

    def agree(self, one: str, other: str) -> int:
        """Length of what two texts begin with alike; it ends inside no control token."""
        length = common_prefix(one, other)
        for text in (one, other):
            for match in self.control.finditer(text, max(0, length - 200)):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    def tokens(self, text: str) -> list[str]:
        return [match[0] for match in self.control.finditer(text)]

    def through_last(self, text: str) -> str:
        """The text to the end of its last control token; empty where it has none."""
        ends = [match.end() for match in self.control.finditer(text)]
        return text[: ends[-1]] if ends else ""

    def through_first(self, text: str) -> str:
        match = self.control.search(text)
        return text[: match.end()] if match else ""


def find_traits(
    template: ChatTemplate, with_tools: bool, variables: dict[str, Any], control: re.Pattern[str]
) -> Traits:
    """Renders the probes. `control` matches the control tokens of the tokenizer. Raises UnsafeDataError alone."""
    probe = Probe(template, with_tools, variables, control)
    form = _find_form(probe)
    probe.request = Request(probe.request.tools, variables, form or Form())
    plain = probe.text(PROBE)
    if form is None or plain is None or ANSWER not in plain:
        reason = probe.problem or f"the template does not write the answer: {(plain or '')[-200:]!r}"
        return Traits(problem=reason)
    answer = _ending_of_answers(probe, plain)
    call = _ending_of_calls(probe, answer)
    thinking, openings = _openings(probe, plain)
    between = set(_structural(probe, plain, answer, call))
    structural = frozenset(between - {*probe.tokens(thinking)} | {*template.special_tokens})
    source = template.source(probe.request.tools)
    own = frozenset(token for token in probe.inside() if token not in structural)
    own |= {token for token in probe.tokens(source) if token not in structural}
    return Traits(
        form,
        thinking,
        _header(probe, [thinking, *openings]),
        openings,
        answer,
        call,
        own,
        structural,
        frozenset(_written(probe)),
    )


def _find_form(probe: Probe) -> Form | None:
    """The first form of messages in which their words appear, and not as Python shows a dictionary."""
    contents = [form for form in (Form(), Form("parts")) if _shows(probe.text(PROBE, form=form), USER, ANSWER)]
    if not contents:
        return None
    found = []
    for messages in (CALLED[:2], CALLED):
        for each in FORMS:
            form = Form(contents[0].content, each.arguments, each.silence)
            text = probe.text(messages, form=form)
            if text is not None and _shows(text, NAME, VALUE):
                found.append((str({"nest": VALUE}) in text, form))
    return min(found, key=lambda pair: pair[0])[1] if found else contents[0]


def _shows(text: str | None, *words: str) -> bool:
    return text is not None and all(word in text for word in words)


def _after(text: str, word: str) -> str:
    return text[text.rindex(word) + len(word) :]


def _between(text: str | None, first: str, second: str) -> str | None:
    """What lies between two words, the nearest ones."""
    if text is None or second not in text or first not in text[: text.rindex(second)]:
        return None
    return _after(text[: text.rindex(second)], first)


def _made(probe: Probe, mark: str, last: str) -> Ending | None:
    """The ending whose mark is given, where `last` follows the words of a turn that is the last."""
    if not mark:
        return None
    shared = probe.agree(mark, last)
    tokens = probe.tokens(mark)
    return Ending(mark, rest=last[shared:], missing=mark[shared:], token=tokens[-1] if tokens else mark)


def _ending_of_answers(probe: Probe, plain: str) -> Ending | None:
    """What follows an answer wherever it stands; else what follows a last one, or else one in the middle."""
    last, middle = _after(plain, ANSWER), _between(probe.text(TWO_TURNS), ANSWER, NEXT_USER)
    if middle is None:
        return _made(probe, probe.through_last(last) or last.rstrip(" "), last)
    common = _common_end(probe, last, middle, plain)
    mark = _mark_in(probe, common, last, middle, plain) or common.rstrip(" ") or _without_header(middle, plain)
    return _made(probe, mark, last)


def _mark_in(probe: Probe, common: str, last: str, middle: str, text: str) -> str:
    """To the last control token after every turn; else to the first after the last turn, or after one amid others."""
    own = probe.through_first(last[len(common) :])
    is_header = bool(own) and probe.tokens(own)[-1] in _leading_tokens(probe, text)
    return probe.through_last(common) or ("" if is_header else own and common + own) or probe.through_first(middle)


def _common_end(probe: Probe, last: str, middle: str, plain: str) -> str:
    """What follows the last turn and one in the middle alike.

    A template that writes the next header without being asked ends so, too; what opens a conversation closes no turn.
    """
    common = last[: probe.agree(last, middle)]
    if len(common) == len(last):
        return common
    opening = set(_leading_tokens(probe, plain))
    places = [match.start() for match in probe.control.finditer(common) if match[0] in opening]
    return common[: places[0]] if places else common


def _leading_tokens(probe: Probe, text: str) -> Iterator[str]:
    """The control tokens with which a text begins."""
    at = 0
    for match in probe.control.finditer(text):
        if match.start() != at:
            return
        yield match[0]
        at = match.end()


def _without_header(middle: str, plain: str) -> str:
    """What lies between an answer and the next question, without what stands before the first question too."""
    header = common_prefix(middle[::-1], plain[: plain.index(USER)][::-1]) if USER in plain else 0
    return middle[: len(middle) - header] or middle


def _ending_of_calls(probe: Probe, answer: Ending | None) -> Ending | None:
    called = probe.text(CALLED[:2])
    middle = _between(probe.text(CALLED), VALUE, RESULT)
    if not _shows(called, NAME, VALUE):  # a template may want to see the result
        return None
    assert called is not None
    last = _after(called, VALUE)
    if middle is None:
        return _made(probe, probe.through_last(last), last)
    common = _common_end(probe, last, middle, called)
    follows = probe.through_first(middle[len(common) :])
    if answer is not None and answer.missing and follows:  # what comes next ends the turn
        return _made(probe, common + follows, last)
    return _made(probe, _mark_in(probe, common, last, middle, called) or common.rstrip(" "), last)


def _turns() -> Iterator[tuple[list[Message], Message, str, str]]:
    """Conversations up to an answer, the answer, and the words that it holds: first of its reasoning, then its text."""
    for before in (PROBE[:1], TWO_TURNS[:3], CALLED[:3]):
        yield before, PROBE[1], "", ANSWER
        yield before, {**PROBE[1], **THOUGHT}, REASONING, ANSWER
        yield before, CALL, "", VALUE
        yield before, {**CALL, **THOUGHT}, REASONING, VALUE


def _openings(probe: Probe, plain: str) -> tuple[str, tuple[str, ...]]:
    """Ends of the generation prompt that an answer need not have: of a think block, and all others.

    A prompt opens a think block where reasoning goes on at its end, and an answer without reasoning does not.
    """
    thinking, found, heads = "", set(), set(_leading_tokens(probe, plain))
    for before, answer, reasoning, said in _turns():
        prompt, text = probe.text(before, prompt=True), probe.text([*before, answer])
        if prompt is None or text is None or said not in text:
            continue
        shared = probe.agree(prompt, text)
        opening = prompt[shared:]
        if before[-1]["content"] not in prompt[:shared] or heads & set(probe.tokens(opening)):
            continue  # another text already before the answer
        if opening:
            found.add(opening)
        bare = probe.text([*before, PROBE[1]])
        thinks = bool(reasoning) and said == ANSWER and text.startswith(reasoning, shared)
        if thinks and bare is not None and not bare.startswith(said, min(shared, probe.agree(prompt, bare))):
            thinking = max(thinking, prompt[_last_word(probe, prompt[:shared]) :], key=len)
    return thinking, tuple(sorted(found - {thinking}, key=lambda text: (len(text), text)))


def _last_word(probe: Probe, text: str) -> int:
    """Where the last control token of a text begins, or what stands after it without a space inside."""
    marks = list(probe.control.finditer(text))
    if marks and not text[marks[-1].end() :].strip():
        return marks[-1].start()
    word = re.search(r"\S+\s*$", text)
    return max(word.start() if word else len(text), marks[-1].end() if marks else 0)


def _header(probe: Probe, openings: list[str]) -> str:
    prompt = probe.text(PROBE[:1], prompt=True) or ""
    opening = max((opening for opening in openings if prompt.endswith(opening)), key=len, default="")
    prompt = prompt[: len(prompt) - len(opening)]
    marks = [match.start() for match in probe.control.finditer(prompt) if match.start() > prompt.rfind(USER)]
    return prompt[marks[-1] :] if marks else ""


def _structural(probe: Probe, plain: str, answer: Ending | None, call: Ending | None, thinking: str) -> Iterator[str]:
    """The control tokens of headers and ends: those between what two speakers say."""
    yield from _leading_tokens(probe, plain)
    for ending in (answer, call):
        yield from [ending.token] if ending and ending.token in probe.tokens(ending.token) else []
    to_result = _between(probe.text(CALLED), VALUE, RESULT) or ""
    between = [
        _between(probe.text(TWO_TURNS), ANSWER, NEXT_USER),
        to_result[len(call.mark) if call else 0 :],
    ]
    for before in (PROBE[:1], CALLED[:3]):
        headers = [_after(text, before[-1]["content"]) for text in probe.prompts(before, [PROBE[1], CALL])]
        common = min(headers, key=len, default="")
        for header in headers:
            common = common[: probe.agree(common, header)]
        between.append(common)
    system = probe.text([{"role": "system", "content": SYSTEM}, *PROBE])
    if system is not None and SYSTEM in system:
        between += [system[probe.agree(plain, system) : system.index(SYSTEM)], _between(system, SYSTEM, USER)]
    for text in filter(None, between):
        yield from probe.tokens(text)


def _written(probe: Probe) -> Iterator[str]:
    """What of a conversation the template writes somewhere."""
    system = [{"role": "system", "content": SYSTEM}, *PROBE]
    for kind, messages, word in (
        ("system message", system, SYSTEM),
        ("reasoning", [PROBE[0], {**PROBE[1], **THOUGHT}], REASONING),
        ("reasoning beside tool calls", [PROBE[0], {**CALL, **THOUGHT}], REASONING),
        ("tool calls", CALLED[:2], VALUE),
        ("tool calls", CALLED, VALUE),
        ("tool results", CALLED, RESULT),
        ("tools", PROBE, NAME),
    ):
        if word in (probe.text(messages) or ""):
            yield kind
