"""One message, as people and other kits write it, turned into what chat templates know.

What a template could not use is moved to where it can, or refused, or noted: nothing of a message goes by in silence.
"""

import json
from typing import Any

from dataset.errors import RowError
from dataset.formats import MARKS, MEDIA, is_blank, nested_json, refuse_media, text
from dataset.strict_json import kind_of

ROLES = ("system", "user", "assistant", "tool")
PLAIN = frozenset({"role", "content", "reasoning_content", "name", "tool_call_id", "tool_calls"})
OPTIONAL_TEXTS = ("reasoning_content", "name", "tool_call_id")
OTHER_REASONING = ("reasoning", "thinking")
READ = PLAIN.union(OTHER_REASONING, MARKS)
MEDIA_PARTS = MEDIA | {
    "image_url", "video_url", "audio_url", "input_image", "input_video", "input_audio", "input_file", "file"
}  # fmt: skip
AROUND_FUNCTION = frozenset({"id", "type", "index", "function"})
OF_FUNCTION = frozenset({"name", "arguments"})
CALL = AROUND_FUNCTION | OF_FUNCTION

Message = dict[str, Any]


def parse_message(message: Any, where: str, notes: list[str]) -> tuple[Message, bool | None]:
    """The message with the keys that templates know, its content as text, and whether it says to be trained.

    `notes` learns what was read otherwise than it was written, and what was not read.
    """
    if not isinstance(message, dict):
        raise RowError("BAD_TYPE", f"{where} must be an object, found {kind_of(message)}")
    role = text(message, "role", where)
    if role == "developer":
        notes.append("the role 'developer' is read as system")
        role = "system"
    if role not in ROLES:
        raise RowError("UNKNOWN_ROLE", f"{where} has the role {role[:40]!r}, known are {', '.join(ROLES)}, developer")
    plain = message.keys() <= PLAIN  # nearly all are, and they should cost no more than this
    if not plain:
        _look_at_others(message, where, notes)
    parsed = {key: text(message, key, where) for key in OPTIONAL_TEXTS if message.get(key) is not None}
    if not plain:
        _add_reasoning(parsed, message, where)
    calls = objects(message.get("tool_calls"), f"{where}.tool_calls")
    content = message.get("content")
    if not isinstance(content, str):
        content = _text_of(message, role, bool(calls), where, notes)
    if calls and role != "assistant":
        raise RowError("BAD_TYPE", f"{where} has the role {role!r}, but only the assistant calls tools")
    if role == "assistant" and not (content.strip() or calls or parsed.get("reasoning_content", "").strip()):
        raise RowError("EMPTY_ASSISTANT", f"{where} is an assistant turn without text, reasoning and tool calls")
    tool_calls = [_parse_call(call, f"{where}.tool_calls[{index}]", notes) for index, call in enumerate(calls)]
    wish = None if plain else _wish(message, role, where)
    return {"role": role, "content": content, **parsed, **({"tool_calls": tool_calls} if calls else {})}, wish


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns a list of objects, which MiniMind writes as a JSON string; null and a blank string are an empty list."""
    if isinstance(value, str):
        value = nested_json(value, where) if value.strip() else None
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise RowError("BAD_TYPE", f"{where} must be a list of objects, found {kind_of(value)}")
    if not value:
        return []
    as_json(value, where)
    return value


def as_json(value: Any, where: str) -> str:
    """The value as JSON text; raises RowError for what JSON cannot say, which tables can hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowError("NON_FINITE", f"{where} holds a number that is not finite") from error
    except TypeError as error:
        raise RowError("BAD_TYPE", f"{where} holds bytes") from error
    except RecursionError as error:
        raise RowError("JSON_SYNTAX", f"{where} is nested too deeply") from error


def _look_at_others(message: Message, where: str, notes: list[str]) -> None:
    """Notes the keys that nobody reads; refuses those that would change what the message says."""
    for key, value in message.items():
        if key in READ or is_blank(value):
            continue
        refuse_media(key, value, where)
        if key == "function_call":
            raise RowError("BAD_TYPE", f"{where} has a 'function_call': write it as 'tool_calls', which took its place")
        if key == "train_detail":
            raise RowError(
                "BAD_TYPE", f"{where} has a 'train_detail': a message is trained whole or not at all, say so by 'train'"
            )
        notes.append(f"the field {key[:40]!r} of messages is not read")


def _add_reasoning(parsed: Message, message: Message, where: str) -> None:
    """Moves reasoning under another name to the one that templates know."""
    for key in OTHER_REASONING:
        if message.get(key) is not None:
            said, known = text(message, key, where), parsed.get("reasoning_content")
            if said and known and said != known:
                names = ", ".join(repr(name) for name in ("reasoning_content", *OTHER_REASONING) if message.get(name))
                raise RowError("BAD_TYPE", f"{where} has reasoning under {names}, with different texts: keep one")
            parsed["reasoning_content"] = known or said


def _wish(message: Message, role: str, where: str) -> bool | None:
    """Whether a message says to be trained: `weight` (OpenAI), `train`, or the marks of other kits."""
    marks = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, (bool, int, float)) or mark not in (0, 1):
            raise RowError(
                "BAD_TYPE",
                f"{where}: {key!r} must be 0 or 1, false or true, found {repr(mark)[:40]}; a message is trained whole "
                "or not at all",
            )
    wishes = {bool(mark) != (key == "masked") for key, mark in marks.items()}
    if len(wishes) > 1:
        said = ", ".join(f"{key!r}: {json.dumps(mark)}" for key, mark in marks.items())
        raise RowError("BAD_TYPE", f"{where} has marks that contradict each other ({said}): keep one")
    if True in wishes and role != "assistant":
        (key, mark), *_ = marks.items()
        raise RowError(
            "BAD_TYPE",
            f"{where} has the role {role!r} and asks to be trained ({key!r}: {json.dumps(mark)}), but only what the "
            "assistant says can be: take the mark out (--train_on all trains every token)",
        )
    return wishes.pop() if wishes else None


def _text_of(message: Message, role: str, calls: bool, where: str, notes: list[str]) -> str:
    """The content as text, where it is written as something else; raises RowError where it has no text to give."""
    content = message.get("content")
    if content is None and calls:  # OpenAI's clients write null beside tool calls
        return ""
    if role == "tool" and content is None:
        notes.append("a tool result that is null is read as an empty text")
        return ""
    if isinstance(content, list) and (role != "tool" or _are_parts(content)):
        return _joined(content, where, notes)
    if role == "tool":
        notes.append("a tool result that is no text is written as JSON")
        return as_json(content, f"'content' of {where}")
    return text(message, "content", where)


def _are_parts(content: list[Any]) -> bool:
    """Whether a tool's result is a list of content parts and not a list that the tool returned."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    return bool(kinds) and all(isinstance(kind, str) and (kind == "text" or kind in MEDIA_PARTS) for kind in kinds)


def _joined(parts: list[Any], where: str, notes: list[str]) -> str:
    """The text of content that is written in parts."""
    texts = []
    for index, part in enumerate(parts):
        place = f"content[{index}] of {where}"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise RowError("BAD_TYPE", f"{place} must be a string or an object with a 'type', found {kind_of(part)}")
        if kind in MEDIA_PARTS:
            raise RowError("MEDIA", f"{place} is of type {kind!r}, but this kit trains text only: leave such rows out")
        if kind != "text":
            raise RowError("BAD_TYPE", f"{place} is of type {kind[:40]!r}, only 'text' can be read")
        key = "value" if "value" in part and "text" not in part else "text"  # `value` is LLaMA-Factory's word
        texts.append(text(part, key, place))
        for other, value in part.items():
            if other not in ("type", key) and not is_blank(value):
                notes.append(f"the field {other[:40]!r} of content parts is not read")
    if len(texts) > 1:
        notes.append("content in several parts is read as their text, one after the other")
    return "".join(texts)


def _parse_call(call: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """Returns a call in OpenAI's form with its arguments as an object, whichever way it was written."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError("BAD_TYPE", f"{where}.function must be an object, found {kind_of(function)}")
    others = []
    for part, known in ((call, CALL),) if function is call else ((call, AROUND_FUNCTION), (function, OF_FUNCTION)):
        if not part.keys() <= known:
            others += [key for key, value in part.items() if key not in known and not is_blank(value)]
    arguments = _arguments(function, others, where, notes)
    notes += [f"the field {key[:40]!r} of tool calls is not read" for key in others]
    number = {"id": text(call, "id", where)} if call.get("id") is not None else {}
    return number | {"type": "function", "function": {"name": text(function, "name", where), "arguments": arguments}}


def _arguments(function: dict[str, Any], others: list[str], where: str, notes: list[str]) -> dict[str, Any]:
    """The arguments of a call; logs have "" or nothing there for functions without parameters."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        if not arguments.strip():
            notes.append("empty arguments of a tool call are read as {}")
            return {}
        arguments = nested_json(arguments, f"{where}.arguments")
    if arguments is None:
        if others:  # one of which may hold them
            found = ", ".join(repr(key[:40]) for key in others[:10])
            raise RowError("MISSING_FIELD", f"{where} has no 'arguments', but {found}: give them that name")
        notes.append("missing arguments of a tool call are read as {}")
        return {}
    if not isinstance(arguments, dict):
        raise RowError("BAD_TYPE", f"{where}.arguments must be an object, found {kind_of(arguments)}")
    return arguments
