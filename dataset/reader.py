"""Conversations from files: whatever turns the bytes of a data file into validated messages lives here.

Three layouts are told apart by their keys: OpenAI `messages`, MiniMind `conversations`, and named prompt and response
fields. Every row that cannot be trained becomes a `Defect` with a stable code instead of an exception, so that one pass
over a file reports all of them; JSON is read strictly, because a lenient parser trains what nobody wrote.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_LINE_BYTES = 64 * 1024 * 1024  # a "line" beyond this is a file of another kind
DETECTION_LINES = 100
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
FOLLOWS = {  # which roles may come after which; None is the start of the conversation
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

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
        rest = len(defects) - len(lines)
        tail = f", {rest} of them not shown here" if rest else ""
        super().__init__("\n".join([*lines, f"{len(defects)} defect{'s' * (len(defects) != 1)} in the data{tail}"]))


@dataclass(frozen=True)
class Fields:
    """Names of the columns of a prompt and response file; all None means a file of messages."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise ValueError(f"prompt_field={self.prompt!r} and response_field={self.response!r}: give both or neither")
        if self.system is not None and self.prompt is None:
            raise ValueError(f"system_field={self.system!r} needs prompt_field and response_field")


@dataclass(frozen=True)
class Conversation:
    """One validated row: messages with roles in order, and the tools that it may call."""

    line: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversations(path: Path, fields: Fields, layout: str | None = None) -> Iterator[Conversation | Defect]:
    """Yields one item per line of the file, a conversation or the reason why there is none."""
    layout = layout or detect_layout(path, fields)
    for line, row in _read_rows(path):
        if isinstance(row, RowError):
            yield Defect(str(path), line, row.code, str(row))
            continue
        try:
            messages, tools = _parse_row(row, layout, fields)
            _check_order(messages)
        except RowError as error:
            yield Defect(str(path), line, error.code, str(error))
        else:
            yield Conversation(line, messages, tools)


def detect_layout(path: Path, fields: Fields) -> str:
    """Names the layout of a file: "fields", "messages" or "conversations", by the first rows that parse."""
    if fields.prompt is not None:
        return "fields"
    for line, row in _read_rows(path):
        if isinstance(row, dict):
            for layout in ("messages", "conversations"):
                if layout in row:
                    return layout
        if line >= DETECTION_LINES:
            break
    return "messages"  # every row will say which key it lacks


def describe_layout(layout: str, fields: Fields) -> str:
    """Says in words what `detect_layout` found, for the log."""
    if layout == "fields":
        system = f", system field {fields.system!r}" if fields.system is not None else ""
        return f"prompt field {fields.prompt!r}, response field {fields.response!r}{system}"
    return {"messages": "OpenAI messages", "conversations": "MiniMind conversations (role/content)"}[layout]


def load_json(text: str) -> Any:
    """Parses JSON strictly: duplicate keys, NaN, Infinity and numbers beyond a double raise RowError."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError("JSON_SYNTAX", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("JSON_SYNTAX", "nested too deeply") from error
    except RowError:
        raise
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RowError("JSON_SYNTAX", "an integer has too many digits") from error


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, JSON object or RowError) for each line; defects of the file itself have line 0."""
    try:
        with path.open("rb") as file:
            line = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                try:
                    if len(raw) > MAX_LINE_BYTES:
                        _skip_to_newline(file, raw)
                        raise RowError("LINE_TOO_LONG", f"more than {MAX_LINE_BYTES} bytes before the line ends")
                    yield line, _decode_row(raw)
                except RowError as error:
                    yield line, error
            if line == 0:
                yield 0, RowError("EMPTY_FILE", "the file is empty")
    except OSError as error:
        yield 0, RowError("NO_FILE", f"cannot be read: {error.strerror}")


def _skip_to_newline(file: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(MAX_LINE_BYTES)


def _decode_row(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RowError("UTF8", f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from error
    if text.startswith("\ufeff"):
        raise RowError("UTF8", "starts with a byte order mark: save the file as UTF-8 without one")
    if not text.strip():
        raise RowError("BLANK_LINE", "the line is blank")
    row = load_json(text)
    if not isinstance(row, dict):
        raise RowError("NOT_OBJECT", f"expected one JSON object per line, found {_kind(row)}")
    if "\\ud" in text.lower():
        _refuse_surrogates(row)
    return row


def _refuse_surrogates(row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("UTF8", "an escape spells half of a surrogate pair, which is no character") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError("DUPLICATE_KEY", f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return row


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowError("NON_FINITE", f"the number {text[:40]} is not finite")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise RowError("NON_FINITE", f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def _parse_row(row: dict[str, Any], layout: str, fields: Fields) -> tuple[list[Message], list[dict[str, Any]] | None]:
    if layout == "fields":
        turns = (("system", fields.system), ("user", fields.prompt), ("assistant", fields.response))
        named = [{"role": role, "content": _text(row, name, "the row")} for role, name in turns if name is not None]
        return [_parse_message(message, "the row") for message in named], None
    messages = _required(row, layout, "the row")
    if not isinstance(messages, list) or not messages:
        raise RowError("BAD_TYPE", f"{layout} must be a list with at least one message, found {_kind(messages)}")
    tools = row.get("tools")
    if layout == "conversations" and tools is None and isinstance(messages[0], dict):
        tools = messages[0].get("tools")  # MiniMind keeps them in the system message
    parsed = [_parse_message(message, f"{layout}[{index}]") for index, message in enumerate(messages)]
    return parsed, _objects(tools, "tools") or None


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError("BAD_TYPE", f"{where} must be an object, found {_kind(message)}")
    role = _text(message, "role", where)
    if role not in ROLES:
        raise RowError("UNKNOWN_ROLE", f"{where} has role {role[:40]!r}; known are {', '.join(ROLES)}")
    for key in ("weight", "train"):  # ignoring a wish not to train this turn would train it
        if message.get(key) is not None:
            raise RowError("UNSUPPORTED", f"{where} chooses its own {key}, which is not supported")
    parsed: Message = {key: _text(message, key, where) for key in MESSAGE_KEYS[2:] if _has_text(message, key)}
    calls = _objects(message.get("tool_calls"), f"{where}.tool_calls")
    if calls:
        parsed["tool_calls"] = [_parse_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    silent = calls and message.get("content") is None  # OpenAI writes null next to tool calls
    content = "" if silent else _text(message, "content", where)
    if role == "assistant" and not (content.strip() or calls or parsed.get("reasoning_content", "").strip()):
        raise RowError("EMPTY_ASSISTANT", f"{where} is an assistant turn with nothing to say")
    if calls and role != "assistant":
        raise RowError("BAD_TYPE", f"{where} has role {role!r}, but only the assistant calls tools")
    return {"role": role, "content": content, **parsed}


def _has_text(message: Message, key: str) -> bool:
    return key != "tool_calls" and message.get(key) is not None


def _parse_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the call as {"type", "function": {"name", "arguments": object}}, whichever way it was written."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError("BAD_TYPE", f"{where}.function must be an object, found {_kind(function)}")
    name, arguments = _text(function, "name", where), _required(function, "arguments", where)
    if isinstance(arguments, str):
        arguments = _nested_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError("BAD_TYPE", f"{where}.arguments must be an object, found {_kind(arguments)}")
    known = {"id": _text(call, "id", where)} if call.get("id") is not None else {}
    return {**known, "type": "function", "function": {"name": name, "arguments": arguments}}


def _check_order(messages: list[Message]) -> None:
    before: str | None = None
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWS[before] or (role == "tool" and before == "assistant" and not _calls(messages, index)):
            after = f"after {before}" if before else "at the start"
            raise RowError(
                "BAD_ORDER", f"message {index} has role {role!r} {after}{' without tool calls' * (role == 'tool')}"
            )
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("NO_ASSISTANT", "no assistant turn, so there is nothing to train on")


def _calls(messages: list[Message], index: int) -> bool:
    return "tool_calls" in messages[index - 1]


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns a list of objects that may have been written as a JSON string, as MiniMind does; None is an empty list."""
    if isinstance(value, str):
        value = _nested_json(value, where) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError("BAD_TYPE", f"{where} must be a list of objects, found {_kind(value)}")
    return value


def _nested_json(text: str, where: str) -> Any:
    try:
        return load_json(text)
    except RowError as error:
        raise RowError(error.code, f"{where} is a string that should hold JSON: {error}") from error


def _required(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise RowError(
            "MISSING_FIELD", f"{where} has no {key!r}; it has {', '.join(map(repr, list(row)[:10])) or 'no key'}"
        )
    return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = _required(row, key, where)
    if not isinstance(value, str):
        raise RowError("BAD_TYPE", f"{where}.{key} must be a string, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
