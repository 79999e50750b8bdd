"""What a row says and its rendering does not: templates leave out what they do not know, and say nothing."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from dataset.control_tokens import strings_in
from dataset.errors import RowError
from dataset.reader import Message
from dataset.traits import Traits

CHANGE = "Wolpertinger"  # put into a text to see whether the rendering changes
NEVER_TRAINED = ("names", "tools")


@dataclass(frozen=True)
class Missing:
    """A kind of content that is not written, of a message or (None) of the row."""

    turn: int | None
    kind: str
    is_all: bool = False  # nothing of the message is written


def missing_from(
    messages: list[Message], tools: Any, traits: Traits, whole: str, said: dict[int, str],
    render: Callable[[list[Message]], str], skip: Collection[int] = (),
) -> Iterator[Missing]:  # fmt: skip
    """Yields what is missing in a rendering, `whole`.

    `said`: for each message that is trained what it became; what others say may stand anywhere. Those in `skip` are not
    looked at. `render` renders changed messages: a template may write a text in another form, and then it changes too.
    """

    def are_written(at: int, name: str, pieces: list[str]) -> bool:
        """Whether the rendering changes with the beginnings and with the ends of these texts."""
        for before, after in ((CHANGE, ""), ("", CHANGE)):
            changed = {**messages[at], name: _altered(messages[at][name], pieces, before, after)}
            try:
                if render([*messages[:at], changed, *messages[at + 1 :]]) == whole:
                    return False
            except RowError:  # it is read, at least
                return True
        return True

    for at, message in enumerate(messages):
        if at in skip:
            continue
        region, parts = said.get(at, whole), list(_parts_of(message))
        if len(parts) == 1 and _stand_alone(parts[0][2], region) and _is_known(parts[0][0], message, traits):
            continue  # as nearly all messages do
        strings = list(strings_in(message))
        absent, anything = [], False
        for kind, name, texts in parts:
            pieces = _pieces(texts, traits.own_tokens)
            doubtful = [piece for piece in pieces if not _stands(piece, region, strings)]
            known = _is_known(kind, message, traits)
            changing = known and (len(doubtful) == 1 or (bool(doubtful) and are_written(at, name, doubtful)))
            present = [piece for piece in doubtful if changing and are_written(at, name, [piece])]
            anything = anything or bool(present) or (known and len(doubtful) < len(pieces))
            if not known or len(present) < len(doubtful):
                absent.append(kind)
        yield from (Missing(at, kind, not anything) for kind in absent)
    if tools and not ("tools" in traits.writes and all(name in whole for name in _names_of(tools))):
        yield Missing(None, "tools")


def _stand_alone(texts: list[str], region: str) -> bool:
    """Whether a single text stands in the region as it is."""
    return len(texts) == 1 and texts[0].strip() in region


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


def _stands(piece: str, region: str, strings: list[str]) -> bool:
    """Whether a text stands there as it is or as JSON writes it, once for each text of the message that holds it."""
    often = sum(piece in text for text in strings)
    if often > 1:
        return region.count(piece) >= often
    return piece in region or any(json.dumps(piece, ensure_ascii=plain)[1:-1] in region for plain in (False, True))


def _altered(value: Any, pieces: list[str], before: str, after: str) -> Any:
    """A JSON value in which these texts, or numbers written so, are others."""
    if isinstance(value, str):
        for piece in pieces:
            value = value.replace(piece, before + piece + after)
        return value
    if isinstance(value, dict):
        return {
            _altered(key, pieces, before, after): _altered(item, pieces, before, after) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_altered(item, pieces, before, after) for item in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value + 1 if is_number and json.dumps(value) in pieces else value
