"""Conversations from files: whatever turns the bytes of a data file into validated messages lives here.

A row that cannot be trained becomes a `Defect` with a stable code instead of an exception, so that one pass over a file
reports all of them. JSON is read strictly, because a lenient parser trains what nobody wrote.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LAYOUTS = {
    "messages": "OpenAI messages",
    "conversations": "MiniMind conversations",
    "fields": "named prompt and response fields",
}
DETECTION_LINES = 100
MAX_LINE_BYTES = 64 * 1024 * 1024  # what has no line end for so long is a file of another kind
FOLLOWS = {  # which roles may come after which; "" is the start of the conversation
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
OPTIONAL_TEXTS = ("reasoning_content", "name", "tool_call_id")

Message = dict[str, Any]


class RowError(ValueError):
    """One row cannot be trained; `code` is the stable word that reports and tests go by."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


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
    """The data cannot be trained as asked; carries every defect and shows the first twenty."""

    SHOWN = 20

    def __init__(self, defects: list[Defect]):
        self.defects = defects
        lines = [str(defect) for defect in defects[: self.SHOWN]]
        hidden = f", {len(defects) - self.SHOWN} of them not shown" if len(defects) > self.SHOWN else ""
        super().__init__("\n".join([*lines, f"{len(defects)} defect{'s' * (len(defects) > 1)} in the data{hidden}"]))


@dataclass(frozen=True)
class Fields:
    """Names of the columns of a prompt and response file; all None for a file of messages."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None) or (self.system is not None and self.prompt is None):
            raise ValueError(
                f"prompt_field={self.prompt!r}, response_field={self.response!r}, system_field={self.system!r}: "
                "prompt and response go together, and a system field goes with them"
            )


@dataclass(frozen=True)
class Conversation:
    """One validated row: messages with roles in order, and the tools that it may call."""

    line: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def detect_layout(path: Path, fields: Fields) -> str:
    """Returns the key in LAYOUTS that the first readable rows speak for."""
    if fields.prompt is not None:
        return "fields"
    for line, row in _read_rows(path):
        found = [layout for layout in ("messages", "conversations") if isinstance(row, dict) and layout in row]
        if found or line >= DETECTION_LINES:
            return found[0] if found else "messages"
    return "messages"  # every row will say what it lacks


def read_conversations(path: Path, fields: Fields) -> Iterator[Conversation | Defect]:
    """Yields one item for each line of the file: its conversation, or the reason why there is none."""
    layout = detect_layout(path, fields)
    for line, row in _read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            messages, tools = _parse_fields(row, fields) if layout == "fields" else _parse_chat(row, layout)
            _check_order(messages)
            yield Conversation(line, messages, tools)
        except RowError as error:
            yield Defect(str(path), line, error.code, str(error))


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yields (line, object or error) for each line; an error of the file itself has line 0."""
    line = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                try:
                    yield line, _parse_line(raw, file)
                except RowError as error:
                    yield line, error
        if line == 0:
            yield 0, RowError("EMPTY_FILE", "the file is empty")
    except OSError as error:
        yield 0, RowError("NO_FILE", f"cannot be read: {error.strerror}")


def _parse_line(raw: bytes, file: BinaryIO) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES)
        raise RowError("LINE_TOO_LONG", f"the line has more than {MAX_LINE_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("UTF8", f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from error
    if text.startswith("\ufeff"):
        raise RowError("UTF8", "begins with a byte order mark: save the file as UTF-8 without one")
    if not text.strip():
        raise RowError("BLANK_LINE", "the line is blank")
    row = _parse_json(text)
    if not isinstance(row, dict):
        raise RowError("NOT_OBJECT", f"each line must hold one JSON object, this one holds {_kind(row)}")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("UTF8", "an escape spells half of a surrogate pair, which is no character") from error
    return row


def _parse_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError("JSON_SYNTAX", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("JSON_SYNTAX", "nested too deeply") from error
    except ValueError as error:  # Python's own limit on the digits of an integer
        raise RowError("JSON_SYNTAX", "an integer has too many digits") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError("DUPLICATE_KEY", f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return row


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(text: str) -> NoReturn:
    raise RowError("NON_FINITE", f"{text[:40]} is no finite number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def _parse_fields(row: dict[str, Any], fields: Fields) -> tuple[list[Message], None]:
    named = (("system", fields.system), ("user", fields.prompt), ("assistant", fields.response))
    texts = [(role, _text(row, name, "the row")) for role, name in named if name is not None]
    messages = [{"role": role, "content": text} for role, text in texts if role != "system" or text.strip()]
    return [_parse_message(message, "the row") for message in messages], None


def _parse_chat(row: dict[str, Any], layout: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
    messages = _required(row, layout, "the row")
    if not isinstance(messages, list) or not messages:
        raise RowError("BAD_TYPE", f"{layout} must be a list with at least one message, found {_kind(messages)}")
    tools = row.get("tools")
    if layout == "conversations" and tools is None and isinstance(messages[0], dict):
        tools = messages[0].get("tools")  # MiniMind keeps them in the first message
    return [_parse_message(m, f"{layout}[{index}]") for index, m in enumerate(messages)], _objects(
        tools, "tools"
    ) or None


def _parse_message(message: Any, where: str) -> Message:
    """Returns the message with the keys that templates know; content is always text."""
    if not isinstance(message, dict):
        raise RowError("BAD_TYPE", f"{where} must be an object, found {_kind(message)}")
    role = _text(message, "role", where)
    if role == "" or role not in FOLLOWS:
        raise RowError("UNKNOWN_ROLE", f"{where} has the role {role[:40]!r}, known are {', '.join(list(FOLLOWS)[1:])}")
    for key in ("weight", "train"):  # to pass over the wish not to train a turn would be to train it
        if message.get(key) is not None:
            raise RowError("UNSUPPORTED", f"{where} sets {key!r}, which is not supported")
    parsed = {key: _text(message, key, where) for key in OPTIONAL_TEXTS if message.get(key) is not None}
    calls = _objects(message.get("tool_calls"), f"{where}.tool_calls")
    silent = calls and message.get("content") is None  # OpenAI's clients write null beside tool calls
    content = "" if silent else _text(message, "content", where)
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
        raise RowError("BAD_TYPE", f"{where}.function must be an object, found {_kind(function)}")
    arguments = _required(function, "arguments", where)
    if isinstance(arguments, str):
        arguments = _nested_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError("BAD_TYPE", f"{where}.arguments must be an object, found {_kind(arguments)}")
    number = {"id": _text(call, "id", where)} if call.get("id") is not None else {}
    return number | {"type": "function", "function": {"name": _text(function, "name", where), "arguments": arguments}}


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
        value = _nested_json(value, where) if value.strip() else None
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise RowError("BAD_TYPE", f"{where} must be a list of objects, found {_kind(value)}")
    return value or []


def _nested_json(text: str, where: str) -> Any:
    try:
        return _parse_json(text)
    except RowError as error:
        raise RowError(error.code, f"in the JSON string {where}: {error}") from error


def _required(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        found = ", ".join(repr(name[:40]) for name in list(row)[:10]) or "no key at all"
        raise RowError("MISSING_FIELD", f"{where} has no {key!r}, it has {found}")
    return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = _required(row, key, where)
    if not isinstance(value, str):
        raise RowError("BAD_TYPE", f"{key!r} of {where} must be a string, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
