"""Conversations from data files: rows in any layout become validated messages, and every refused row a `Defect`."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.files import RowError, kind_of, read_rows
from dataset.layouts import LAYOUTS, Fields, nested_json, required, text

OVERLONG = ("error", "drop", "truncate")  # what may become of a sample that is longer than a row
BAD_ROWS = ("error", "skip")  # and of a row that cannot be trained
VANISHED = ("error", "warn")  # and of one whose answer the chat template does not write
SYSTEM_AS = ("system", "user")  # where a system message stands
DETECTION_ROWS = 100
FOLLOWS = {  # which roles may come after which; "" is the start of the conversation
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
OPTIONAL_TEXTS = ("reasoning_content", "name", "tool_call_id")

Message = dict[str, Any]


@dataclass(frozen=True)
class Defect:
    """A row that was refused; line counts from 1, and 0 speaks of the whole file."""

    path: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.code} {self.message}"


class DataError(ValueError):
    """The data cannot be trained as asked; shows the first twenty defects that stand in the way, and where all are.

    `every` also holds the rows that the options leave out.
    """

    SHOWN = 20

    def __init__(self, defects: list[Defect], file: Path | None = None, every: list[Defect] | None = None):
        self.defects, self.every = defects, every or defects
        lines = [str(defect) for defect in defects[: self.SHOWN]]
        hidden = f", {len(defects) - self.SHOWN} of them not shown" if len(defects) > self.SHOWN else ""
        place = f"; {file} has all of them" if file else ""
        count = f"{len(defects)} defect{'s' * (len(defects) > 1)} in the data"
        super().__init__("\n".join([*lines, f"{count}{hidden}{place}"]))


class UnsafeDataError(ValueError):
    """A chat template that leaves its sandbox or its limits, or a list of files that reaches outside its directory."""


@dataclass(frozen=True)
class Conversation:
    """One validated row: messages with roles in order and the tools that they may call, or a text to train whole.

    `wishes` holds the messages (by number) that say whether they want to be trained.
    """

    line: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    wishes: dict[int, bool] = field(default_factory=dict)


def detect_layout(path: Path, fields: Fields, named: str = "auto") -> str:
    """Returns the name in LAYOUTS that was asked for, or that most of the first rows speak for."""
    if named != "auto" or fields.prompt is not None:
        return "fields" if named == "auto" else named
    votes: Counter[str] = Counter()
    for _, row in itertools.islice(read_rows(path), DETECTION_ROWS):
        if isinstance(row, dict):
            votes.update(itertools.islice((name for name, layout in LAYOUTS.items() if layout.fits(row)), 1))
    return votes.most_common(1)[0][0] if votes else "messages"  # then every row will say what it lacks


def read_conversations(path: Path, fields: Fields, layout: str = "auto") -> Iterator[Conversation | Defect]:
    """Yields one item for each row of the file: its conversation, or the reason why there is none."""
    layout = detect_layout(path, fields, layout)
    for line, row in read_rows(path):
        try:
            yield parse_conversation(line, row, layout, fields)
        except RowError as error:
            yield Defect(str(path), line, error.code, str(error))


def parse_conversation(line: int, row: dict[str, Any] | RowError, layout: str, fields: Fields) -> Conversation:
    """The conversation of a row in a layout; raises RowError where it holds none that can be trained."""
    if isinstance(row, RowError):
        raise row
    if layout == "text":
        whole = text(row, "text", "the row")
        if not whole.strip():
            raise RowError("EMPTY_TEXT", "the text is blank")
        return Conversation(line, [], text=whole)
    turns, tools = LAYOUTS[layout].turns(row, fields)
    messages = [_parse_message(turn, f"message {index}") for index, turn in enumerate(turns)]
    _check_order(messages)
    wishes = {index: wish for index, turn in enumerate(turns) if (wish := _wish(turn, f"message {index}")) is not None}
    return Conversation(line, messages, _objects(tools, "tools") or None, wishes=wishes)


def _wish(turn: Message, where: str) -> bool | None:
    """Whether a message says to be trained: OpenAI's `weight` (0 or 1), or `train` (true or false)."""
    wishes = [turn[key] for key in ("weight", "train") if turn.get(key) is not None]
    for wish in wishes:
        if not isinstance(wish, (bool, int, float)) or wish not in (0, 1):
            raise RowError("BAD_TYPE", f"{where}: 'weight' must be 0 or 1 and 'train' true or false, found {wish!r}")
    if len(set(map(bool, wishes))) > 1:
        raise RowError("BAD_TYPE", f"{where} has a 'weight' and a 'train' that contradict each other")
    if True in wishes and turn["role"] != "assistant":
        raise RowError("BAD_TYPE", f"{where} has the role {turn['role']!r} and asks to be trained")
    return bool(wishes[0]) if wishes else None


def _parse_message(message: Any, where: str) -> Message:
    """Returns the message with the keys that templates know; content is always text."""
    if not isinstance(message, dict):
        raise RowError("BAD_TYPE", f"{where} must be an object, found {kind_of(message)}")
    role = text(message, "role", where)
    if role == "" or role not in FOLLOWS:
        raise RowError("UNKNOWN_ROLE", f"{where} has the role {role[:40]!r}, known are {', '.join(list(FOLLOWS)[1:])}")
    if message.get("function_call") is not None:
        raise RowError("BAD_TYPE", f"{where} has a 'function_call': write it as 'tool_calls', which took its place")
    parsed = {key: text(message, key, where) for key in OPTIONAL_TEXTS if message.get(key) is not None}
    if message.get("reasoning") is not None:
        parsed.setdefault("reasoning_content", text(message, "reasoning", where))
    calls = _objects(message.get("tool_calls"), f"{where}.tool_calls")
    silent = calls and message.get("content") is None  # OpenAI's clients write null beside tool calls
    content = "" if silent else text(message, "content", where)
    if calls and role != "assistant":
        raise RowError("BAD_TYPE", f"{where} has the role {role!r}, but only the assistant calls tools")
    if role == "assistant" and not (content.strip() or calls or parsed.get("reasoning_content", "").strip()):
        raise RowError("EMPTY_ASSISTANT", f"{where} is an assistant turn with nothing in it")
    tool_calls = [_parse_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return {"role": role, "content": content, **parsed, **({"tool_calls": tool_calls} if calls else {})}


def _parse_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a call in OpenAI's form with its arguments as an object, whichever way it was written."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError("BAD_TYPE", f"{where}.function must be an object, found {kind_of(function)}")
    arguments = required(function, "arguments", where)
    if isinstance(arguments, str):
        arguments = nested_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError("BAD_TYPE", f"{where}.arguments must be an object, found {kind_of(arguments)}")
    number = {"id": text(call, "id", where)} if call.get("id") is not None else {}
    return number | {"type": "function", "function": {"name": text(function, "name", where), "arguments": arguments}}


def _check_order(messages: list[Message]) -> None:
    before: Message = {"role": ""}
    for index, message in enumerate(messages):
        role = message["role"]
        uncalled = role == "tool" and before["role"] == "assistant" and "tool_calls" not in before
        if role not in FOLLOWS[before["role"]] or uncalled:
            place = f"after {before['role']!r}" if index else "at the start"
            reason = " that calls no tool" if uncalled else ""
            raise RowError("BAD_ORDER", f"message {index} has the role {role!r} {place}{reason}")
        before = message
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("NO_ASSISTANT", "there is no assistant turn to train on")


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns a list of objects, which MiniMind writes as a JSON string; null and a blank string are an empty list."""
    if isinstance(value, str):
        value = nested_json(value, where) if value.strip() else None
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise RowError("BAD_TYPE", f"{where} must be a list of objects, found {kind_of(value)}")
    if not value:
        return []
    try:
        json.dumps(value, allow_nan=False)  # tables hold more than JSON can say
    except ValueError as error:
        raise RowError("NON_FINITE", f"{where} holds a number that is not finite") from error
    except TypeError as error:
        raise RowError("BAD_TYPE", f"{where} holds bytes") from error
    return value
