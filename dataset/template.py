"""A chat template as transformers compiles it: a Jinja program in a sandbox, stopped when it takes too long.

`render` gives what `tokenizer.apply_chat_template(..., tokenize=False)` gives. That method copies its input for every
call, which took as long as the template itself, and conversations from the reader are plain JSON values already.

Where a turn begins and ends, the rendered first messages tell: a rendering for each of them. Most templates go through
the messages once and look at none that is still to come. What such a one has written when it takes up a message is
what it would have written without that message and those after it, so one rendering tells all.
"""

import contextlib
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

from dataset.files import RowError
from dataset.reader import Message, UnsafeDataError

SECONDS = 5.0  # of computing that the templates of one conversation may take together
MEMORY = 1 << 30  # bytes that they may add to what the process has
BACKWARD = {"index", "index0", "first", "depth", "depth0", "previtem"}  # what `loop` knows without looking ahead

Tools = list[dict[str, Any]] | None


class ChatTemplate:
    """The chat template of a tokenizer, in a sandbox."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer, self._variables = tokenizer, dict(tokenizer.special_tokens_map)
        self._closings: dict[str, dict[bool, str]] = {}

    def render(self, messages: list[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """The text of the messages, and the header of an answer after it; RowError when the template fails."""
        return self._run(messages, tools, generation_prompt)[0]

    def rendering(self, messages: list[Message], tools: Tools, generation_prompt: bool = False) -> "Rendering":
        """As `render`, with the places in the text where its first messages end."""
        text, ends, marked = self._run(messages, tools, generation_prompt)
        source = self._tokenizer.get_chat_template(None, tools)
        if not looks_only_back(source) or len(ends) != len(messages) + 1:
            ends = []
        elif source not in self._closings:
            probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            runs = {prompt: self._run(probe, tools, prompt) for prompt in (False, True)}
            self._closings[source] = {prompt: written[last[-1] :] for prompt, (written, last, _) in runs.items()}
        return Rendering(self, messages, tools, text, ends, self._closings.get(source, {}), marked)

    def _run(
        self, messages: list[Message], tools: Tools, generation_prompt: bool
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        """The text, how much of it was written when each message (and their end) was asked for, and what is marked."""
        pieces: list[str] = []
        ends: list[int] = []
        marked: list[tuple[int, int]] = []
        written = 0

        def note_length() -> None:
            ends.append(written)

        try:
            source = self._tokenizer.get_chat_template(None, tools)
            template = _compile_jinja_template(source)
            tracked = has_marks(source)
            template.environment.unsafe_undefined = _refuse_access  # jinja's own writes nothing and goes on
            with template.environment.activate_tracker(pieces, marked) if tracked else contextlib.nullcontext():
                for piece in template.generate(
                    messages=WatchedList(_alias_reasoning_fields(messages), note_length), tools=tools, documents=None,
                    add_generation_prompt=generation_prompt, **self._variables,
                ):  # fmt: skip
                    pieces.append(piece)
                    written += len(piece)
        except Exception as error:  # a template is a program of its own and may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, (SecurityError, MemoryError, OverflowError, RecursionError)):
                raise UnsafeDataError(f"the chat template leaves its sandbox or its limits: {reason}") from error
            raise RowError("TEMPLATE", f"the chat template failed: {reason}") from error
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


class Rendering:
    """The text of a conversation, which knows where its first messages end."""

    def __init__(
        self, template: ChatTemplate, messages: list[Message], tools: Tools, text: str, ends: list[int],
        closings: dict[bool, str], marked: list[tuple[int, int]],
    ):  # fmt: skip
        """`ends[n]` is the length of the first n messages, without what the template writes after the last one.

        `marked` holds the (start, end) of what stands between `{% generation %}` tags.
        """
        self._template, self._messages, self._tools, self.text = template, messages, tools, text
        self._ends, self._closings, self.marked = ends, closings, marked

    def prefix_length(self, count: int, generation_prompt: bool = False) -> int:
        """Length of the first `count` messages rendered alone.

        Raises RowError where the text of all of them does not begin with that.
        """
        if self._ends and count:
            closing = self._closings[generation_prompt]
            if self.text.startswith(closing, self._ends[count]):
                return self._ends[count] + len(closing)
        alone = self._template.render(self._messages[:count], self._tools, generation_prompt)
        if not self.text.startswith(alone):
            pairs = enumerate(zip(alone, self.text, strict=False))
            at = next((at for at, pair in pairs if pair[0] != pair[1]), len(self.text))
            raise RowError(
                "UNSTABLE_TEMPLATE",
                f"the chat template renders the first {count} messages differently when more follow; the first "
                f"difference is at character {at}: {alone[at : at + 40]!r} alone, {self.text[at : at + 40]!r} with the "
                "rest",
            )
        return len(alone)


@lru_cache
def has_marks(source: str) -> bool:
    """Whether a template says by `{% generation %}` tags what the assistant writes."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


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
    for field, value in parent.iter_fields():
        for child in value if isinstance(value, list) else [value]:
            if _is(child, "messages") and not (
                parent is loop
                or (isinstance(parent, nodes.If) and field == "test")
                or (isinstance(parent, nodes.And) and field == "left")
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
    raise SecurityError(f"access to {attribute!r} of a {type(value).__name__}")


class _TimeIsUp(BaseException):
    """No Exception: those that a template's filters raise, jinja takes for its own in places."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raises UnsafeDataError in a block that computes for longer than SECONDS, MemoryError in one that takes too much.

    Only a process's main thread can be told. Python acts on a signal between two of its instructions, which a single
    huge one (comparing lists that hold each other many times over) keeps waiting. The system itself then ends the
    process by SIGVTALRM, once the block has computed for two seconds more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    over = False

    def stop(_number: int, frame: FrameType | None) -> None:
        # Raised in the lines that end this block, it would leave them undone; the next time comes soon enough.
        ending = frame is not None and frame.f_code.co_filename in (__file__, contextlib.__file__)
        if not (over or ending):
            raise _TimeIsUp

    before, allowed = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    _allow_memory(MEMORY, *allowed)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)  # again and again: what a destructor raises is lost
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + 2)
    try:
        try:
            yield
        finally:
            over = True
    except _TimeIsUp:
        raise UnsafeDataError(f"the chat template took more than {SECONDS} seconds of computing") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, allowed)
        signal.signal(signal.SIGPROF, before)


def _allow_memory(more: int, soft: int, hard: int) -> None:
    """Limit this process to `more` bytes than it has; only Linux tells how many those are."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return
    wanted = int(os.read(descriptor, 64).split()[0]) * resource.getpagesize() + more
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
