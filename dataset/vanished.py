"""What a row says and its rendering does not: templates leave out what they do not know, and say nothing."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dataset.control_tokens import strings_in
from dataset.files import RowError
from dataset.reader import Message
from dataset.traits import Traits

CHANGE = "Wolpertinger"  # put into a text to see whether the rendering changes


def missing_from(
    messages: list[Message], tools: Any, traits: Traits, whole: str, said: dict[int, str],
    render: Callable[[list[Message]], str],
) -> Iterator[tuple[int | None, str, bool]]:  # fmt: skip
    """Yields (number of a message or None, kind of content, whether nothing at all of the message is written).

    `said`: for each message that is trained what it became; what others say may stand anywhere in the `whole` text.
    `render` renders changed messages: a template may write a text in another form, and then it changes with the text.
    """
    own = re.compile("|".join(map(re.escape, sorted(traits.own))) or r"(?!)")

    def changes(at: int, name: str, piece: str) -> bool:
        changed = {**messages[at], name: _altered(messages[at][name], piece)}
        try:
            return render([*messages[:at], changed, *messages[at + 1 :]]) != whole
        except RowError:  # it is read, at least
            return True

    for at, message in enumerate(messages):
        region, absent, anything = said.get(at, whole), [], False
        for kind, name, texts in _parts_of(message):
            known = _is_known(kind, message, traits)
            written = [known and (_stands(piece, region) or changes(at, name, piece)) for piece in _pieces(texts, own)]
            anything = anything or any(written)
            if not all(written):
                absent.append(kind)
        for kind in absent:
            yield at, kind, not anything
    if tools and "tools" not in traits.writes or tools and not all(_stands(name, whole) for name in _names_of(tools)):
        yield None, "tools", False


def _parts_of(message: Message) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, key, texts) of all that a message says."""
    role = message["role"]
    if message["content"].strip():
        yield {"tool": "tool results", "system": "system message"}.get(role, "text"), "content", [message["content"]]
    if message.get("reasoning_content", "").strip():
        yield "reasoning", "reasoning_content", [message["reasoning_content"]]
    if calls := message.get("tool_calls"):
        yield "tool calls", "tool_calls", [text for call in calls for text in _leaves(call["function"])]
    if role != "tool" and message.get("name"):
        yield "names", "name", [message["name"]]


def _leaves(function: dict[str, Any]) -> list[str]:
    """The name of a function and the texts and numbers of its arguments."""
    return [function["name"], *strings_in(function["arguments"]), *_numbers_in(function["arguments"])]


def _numbers_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _names_of(tools: list[dict[str, Any]]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]


def _is_known(kind: str, message: Message, traits: Traits) -> bool:
    """Whether the template writes this kind of content at all: a text may stand somewhere else by chance."""
    if kind == "reasoning" and message.get("tool_calls"):
        kind = "reasoning beside tool calls"
    return kind in ("text", "names") or kind in traits.writes


def _pieces(texts: list[str], own: re.Pattern[str]) -> list[str]:
    """Texts without the space around them, cut at the tokens by which a template may take them apart."""
    return [piece.strip() for text in texts for piece in own.split(text) if piece.strip()]


def _stands(piece: str, region: str) -> bool:
    """Whether a text stands there as it is, or as JSON writes it."""
    return piece in region or any(json.dumps(piece, ensure_ascii=plain)[1:-1] in region for plain in (False, True))


def _altered(value: Any, piece: str) -> Any:
    """A JSON value in which a text, or a number of this text, is another one."""
    if isinstance(value, str):
        return value.replace(piece, piece + CHANGE)
    if isinstance(value, dict):
        return {_altered(key, piece): _altered(item, piece) for key, item in value.items()}
    if isinstance(value, list):
        return [_altered(item, piece) for item in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value + 1 if is_number and json.dumps(value) == piece else value
