"""A chat template as transformers compiles it: a Jinja program in a sandbox, stopped when it takes too long.

`render` gives what `tokenizer.apply_chat_template(..., tokenize=False)` gives. That method copies its input for every
call, which took as long as the template itself, and conversations from the reader are plain JSON values already.

Where a turn begins and ends, the rendered first messages tell: a rendering for each of them. Most templates go through
the messages once and look at none that is still to come. What such a one has written when it takes up a message is
what it would have written without that message and those after it, so one rendering tells all.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import modifies_known_mutable
from transformers import PreTrainedTokenizerFast

# Two private functions: public ones copy every message. The version of transformers is pinned, and a test compares.
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

from dataset.errors import RowError, UnsafeDataError
from dataset.reader import Message
from dataset.sandbox import limits

SECONDS_OF_A_ROW = 30.0
EDITS = re.compile(r"""\.replace\(|\|\s*replace|['"]</?['"]\s*[~+]""")
BACKWARD = {"index", "index0", "first", "depth", "depth0", "previtem"}  # what `loop` knows without looking ahead
PROBE: list[Message] = [{"role": "user", "content": "Quokka"}, {"role": "assistant", "content": "Wombat"}]

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Form:
    """How a template wants its messages. The first of each is OpenAI's form, which the reader gives."""

    content: str = "text"  # or "parts": [{"type": "text", "text": ...}]
    arguments: str = "object"  # or "text": their JSON
    silence: str = "empty"  # of a message that only calls tools; or "null", or "absent"
    no_tools: str = "null"  # or "empty": an empty list

    def of(self, messages: list[Message]) -> list[Message]:
        """The messages in this form."""
        return messages if self == Form() else [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        message = dict(message)
        if calls := message.get("tool_calls"):
            if self.arguments == "text":
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                    for call in calls
                ]
            if self.silence != "empty" and not message["content"]:
                message["content"] = None
                if self.silence == "absent":
                    del message["content"]
        if self.content == "parts" and message.get("content") is not None:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Request:
    """What a conversation hands to the template besides its messages."""

    tools: Tools = None
    variables: dict[str, Any] = field(default_factory=dict)
    form: Form = Form()


class ChatTemplate:
    """The chat template of a tokenizer, in a sandbox. `date` (YYYY-MM-DD) is what it takes for today."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: str | None = None):
        self._tokenizer, self._variables = tokenizer, dict(tokenizer.special_tokens_map)
        if date is not None:
            self._variables["strftime_now"] = datetime.fromisoformat(date).strftime
        self.spent = 0.0  # seconds of computing on this row, which whoever begins another one sets back
        self._closings: dict[tuple[str, str], dict[bool, str]] = {}

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that begin or end a text, and such."""
        return [token for token in self._tokenizer.special_tokens_map.values() if isinstance(token, str)]

    def source(self, tools: Tools) -> str:
        """The template that transformers would take, of several with names too; RowError where there is none."""
        try:
            source = self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise RowError("TEMPLATE", f"no chat template fits: {' '.join(str(error).split())}") from error
        assert isinstance(source, str)
        return source

    def render(self, messages: list[Message], request: Request = Request(), generation_prompt: bool = False) -> str:
        """The text of the messages, and the header of an answer after it; RowError when the template fails."""
        return self._run(messages, request, generation_prompt)[0]

    def rendering(self, messages: list[Message], request: Request, generation_prompt: bool = False) -> "Rendering":
        """As `render`, with the places in the text where its first messages end."""
        text, ends, marked = self._run(messages, request, generation_prompt)
        source = self.source(request.tools)
        key = source, _json(request.variables)
        if not looks_only_back(source) or len(ends) != len(messages) + 1:
            ends = []
        elif key not in self._closings:
            runs = {prompt: self._run(PROBE, request, prompt) for prompt in (False, True)}
            self._closings[key] = {prompt: written[last[-1] :] for prompt, (written, last, _) in runs.items()}
        return Rendering(self, messages, request, text, ends, self._closings.get(key, {}), marked)

    def switches(self, tools: Tools) -> set[str]:
        """The variables of the template that turn thinking on and off, by their names."""
        return {name for name in _names_read(self.source(tools)) if "think" in name}

    def edits_texts(self, tools: Tools) -> bool:
        """Whether the template may make control tokens out of pieces of a text."""
        return _edits_texts(self.source(tools))

    def unread(self, variables: dict[str, Any], tools: Tools) -> list[str]:
        """The variables that the template does not know."""
        return sorted(variables.keys() - _names_read(self.source(tools)))

    def _run(
        self, messages: list[Message], request: Request, generation_prompt: bool
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        """The text, how much of it was written when each message (and their end) was asked for, and what is marked."""
        if self.spent > SECONDS_OF_A_ROW:
            raise RowError(
                "LONG_DIALOGUE",
                f"the chat template has computed for more than {SECONDS_OF_A_ROW:.0f} seconds on this row, whose turns "
                "it renders anew: split the dialogue, or --train_on last",
            )
        started = time.process_time()
        pieces: list[str] = []
        ends: list[int] = []
        marked: list[tuple[int, int]] = []
        written = 0

        def note_length() -> None:
            ends.append(written)

        try:
            with limits():  # jinja computes constants while it compiles
                source = self.source(request.tools)
                template = _compile_jinja_template(source)
                template.environment.unsafe_undefined = _refuse_access  # jinja's own writes nothing and goes on
                track = template.environment.activate_tracker
                with track(pieces, marked) if has_marks(source) else contextlib.nullcontext():
                    for piece in template.generate({
                        **request.variables, **self._variables, "documents": None,
                        "tools": request.tools or ([] if request.form.no_tools == "empty" else None),
                        "messages": WatchedList(_alias_reasoning_fields(request.form.of(messages)), note_length),
                        "add_generation_prompt": generation_prompt,
                    }):  # fmt: skip
                        pieces.append(piece)
                        written += len(piece)
        except (RowError, UnsafeDataError):
            raise
        except Exception as error:  # a template is a program of its own and may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, (SecurityError, MemoryError, OverflowError, RecursionError)):
                raise UnsafeDataError(f"the chat template leaves its sandbox or its limits: {reason}") from error
            raise RowError("TEMPLATE", f"the chat template failed: {reason}") from error
        finally:
            self.spent += time.process_time() - started
        return "".join(pieces), ends, marked


class WatchedList(list):  # type: ignore[type-arg]
    """Tells whenever a loop over it asks for the next item, also when there is none."""

    def __init__(self, items: list[Any], asked: Callable[[], None]):
        super().__init__(items)
        self._asked = asked

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._asked()
            yield item
        self._asked()


@dataclass(frozen=True)
class Prefix:
    """The first messages of a conversation rendered alone: the text of all, up to `shared`, and then `tail`."""

    whole: str
    shared: int
    tail: str

    def __len__(self) -> int:
        return self.shared + len(self.tail)

    def part(self, start: int, end: int) -> str:
        """What stands between two places of this text."""
        start, shared = max(0, start), self.shared
        return self.whole[start : min(end, shared)] + self.tail[max(0, start - shared) : max(0, end - shared)]

    def is_in_whole(self, end: int) -> bool:
        """Whether the text of all messages begins with the first `end` characters of this."""
        return end <= self.shared or self.whole.startswith(self.tail[: end - self.shared], self.shared)


class Rendering:
    """The text of a conversation, which knows how its first messages read alone."""

    def __init__(
        self, template: ChatTemplate, messages: list[Message], request: Request, text: str, ends: list[int],
        closings: dict[bool, str], marked: list[tuple[int, int]],
    ):  # fmt: skip
        """`ends[n]` is the length of the first n messages, without what the template writes after the last one.

        `marked` holds the (start, end) of what stands between `{% generation %}` tags.
        """
        self._template, self.messages, self._request, self.text = template, messages, request, text
        self._ends, self._closings, self.marked = ends, closings, marked
        self.notes: list[str] = []  # on what should be said of it

    @property
    def is_costly(self) -> bool:
        """Whether each prefix takes a rendering of its own."""
        return not self._ends

    def prefix(self, count: int, generation_prompt: bool = False) -> Prefix:
        """The first `count` messages rendered alone."""
        if self._ends and count:
            return Prefix(self.text, self._ends[count], self._closings[generation_prompt])
        alone = self._template.render(self.messages[:count], self._request, generation_prompt) if count else ""
        shared = common_prefix(alone, self.text)
        return Prefix(self.text, shared, alone[shared:])

    def through(self, turn: int) -> Prefix:
        """The messages to this one, which ends the text if it is the last of all."""
        last = turn == len(self.messages) - 1
        return Prefix(self.text, len(self.text), "") if last else self.prefix(turn + 1)


def common_prefix(one: str, other: str) -> int:
    """Length of what two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the texts differ before `high`, and not before `low`
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


@lru_cache
def has_marks(source: str) -> bool:
    """Whether a template says by `{% generation %}` tags what the assistant writes."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


@lru_cache
def _edits_texts(source: str) -> bool:
    return EDITS.search(source) is not None


@lru_cache
def _names_read(source: str) -> frozenset[str]:
    environment: Environment = _compile_jinja_template(source).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(source)))


@lru_cache
def looks_only_back(source: str) -> bool:
    """Whether a template provably writes each message, and then its end, without knowing what comes after.

    It must go through `messages` in one loop at its top level, use them nowhere else but for the first one, ask the
    loop for nothing that lies ahead, and write after the loop what depends on no message.
    """
    environment: Environment = _compile_jinja_template(source).environment
    body = environment.parse(source).body
    loops = [at for at, node in enumerate(body) if isinstance(node, nodes.For) and _is(node.iter, "messages")]
    if len(loops) != 1:
        return False
    loop = body[loops[0]]
    assert isinstance(loop, nodes.For)
    root = nodes.Template(body)
    stored = {name.name for name in root.find_all(nodes.Name) if name.ctx != "load"}
    after = nodes.Template(body[loops[0] + 1 :])
    loaded = {name.name for name in after.find_all(nodes.Name)}
    return (
        not (loop.test or loop.recursive or loop.else_)
        and not {"messages", "loop"} & stored
        and all(_asks_for_no_more(parent, loop) for parent in (root, *root.find_all(nodes.Node)))
        and _looks_back(loop.body)
        and not loaded & (stored | {"messages", "tools", "documents"})
        and not any(after.find_all(nodes.Call))
    )


def _is(node: Any, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _asks_for_no_more(parent: nodes.Node, loop: nodes.For) -> bool:
    """Whether a node uses `messages` as the loop does, as a condition (there always are some), or for the first one."""
    for field_name, value in parent.iter_fields():
        for child in value if isinstance(value, list) else [value]:
            if _is(child, "messages") and not (
                parent is loop
                or (isinstance(parent, nodes.If) and field_name == "test")
                or (isinstance(parent, nodes.And) and field_name == "left")
                or (isinstance(parent, nodes.Getitem) and isinstance(parent.arg, nodes.Const) and parent.arg.value == 0)
            ):
                return False
    return True


def _looks_back(body: list[nodes.Node]) -> bool:
    """Whether statements ask their own loop only for what lies behind; loops inside have a `loop` of their own."""
    waiting: list[nodes.Node] = list(body)
    while waiting:
        node = waiting.pop()
        if _is(node, "loop"):
            return False
        if isinstance(node, nodes.Getattr) and _is(node.node, "loop") and node.attr in BACKWARD:
            continue
        waiting += [node.iter] if isinstance(node, nodes.For) else node.iter_child_nodes()
    return True


def _refuse_access(value: Any, attribute: str) -> NoReturn:
    own = isinstance(value, list) and not isinstance(value, WatchedList)
    if own and modifies_known_mutable(value, attribute):  # careless, but no attack on the conversation
        raise TypeError(f"the sandbox lets no template change a list by {attribute!r}")
    raise SecurityError(f"access to {attribute!r} of a {type(value).__name__}")
