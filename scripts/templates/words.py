"""The texts of a conversation, and other texts in place of them."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Iterator
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Leaf = tuple[int, str, tuple[str | int, ...]]  # message (-1: the tools), kind, where in it
THINK_TAG = re.compile(r"(</?think>)")


def altered(text: str, keep_tags: bool = False) -> str:
    """Another text of the same length in which every letter differs; inline think tags may stay what they are."""
    parts = THINK_TAG.split(text) if keep_tags else [text]
    return "".join(
        part if at % 2 else "".join(map(_other, codecs.encode(part, "rot13"))) for at, part in enumerate(parts)
    )


def _other(character: str) -> str:
    return (
        chr(ord(character) + 1)
        if ord(character) > 0x2E7F and character.isprintable() and character != "｜"
        else character
    )


def leaves(messages: Messages, tools: Tools) -> Iterator[Leaf]:
    """Where the texts of a conversation stand that a template should write."""
    for number, message in enumerate(messages):
        role = message["role"]
        kind = {"system": "system", "tool": "result", "user": "content", "assistant": "content"}[role]
        yield number, kind, ("content",)
        if message.get("reasoning_content"):
            yield number, "reasoning", ("reasoning_content",)
        for at, call in enumerate(message.get("tool_calls", [])):
            yield number, "call", ("tool_calls", at, "function", "name")
            for where in _strings(call["function"]["arguments"]):
                yield number, "call", ("tool_calls", at, "function", "arguments", *where)
    for at, tool in enumerate(tools or []):
        yield -1, "tools", (at, "function", "description") if tool else ()


def _strings(value: Any) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, str):
        yield ()
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        for where in _strings(item):
            yield (key, *where)


def at_leaf(messages: Messages, tools: Tools, leaf: Leaf) -> Any:
    value: Any = messages[leaf[0]] if leaf[0] >= 0 else tools
    for key in leaf[2]:
        value = value[key]
    return value


def with_leaf(messages: Messages, tools: Tools, leaf: Leaf) -> tuple[Messages, Tools]:
    """The conversation with one of its texts altered."""
    messages, tools = copy.deepcopy(messages), copy.deepcopy(tools)
    value: Any = messages[leaf[0]] if leaf[0] >= 0 else tools
    for key in leaf[2][:-1]:
        value = value[key]
    answers = leaf[0] >= 0 and messages[leaf[0]]["role"] == "assistant"
    value[leaf[2][-1]] = altered(value[leaf[2][-1]], keep_tags=answers and leaf[1] == "content")
    return messages, tools


def common(left: str | bytes, right: str | bytes) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
