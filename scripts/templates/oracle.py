"""What transformers makes of a conversation, and which characters of it each message wrote.

Nothing here knows how the kit renders. A text is replaced by another of the same length in which every letter differs:
the places where the two renderings differ are those that the text wrote.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from scripts.templates.families import BYTES, added
from scripts.templates.words import THINK_TAG, Leaf, Messages, Tools, at_leaf, common, leaves, with_leaf

# what a template may open before the content; where that is part of the prompt already, it may be trained or not
OPENING = re.compile(
    r"\n?(</?\|?(\w+:)?"
    r"(inner_prefix|think|thinking|reasoning|START_THINKING|END_THINKING|START_RESPONSE|START_TEXT|channel|content)(:\w+)?\|?>"
    r"|\[/?THINK\]|<\|open\|>think)"
)
MARKS_ITSELF = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SOME_TOOLS: Tools = [
    {"type": "function", "function": {"name": "spice", "description": "", "parameters": {"type": "object"}}}
]
BYTE_OF = {chr(value): value for value in BYTES} | {
    chr(256 + at): value for at, value in enumerate(value for value in range(256) if value not in BYTES)
}


def _without_content(messages: Messages) -> Messages:
    return [m | {"content": None} if m.get("tool_calls") and not m["content"] else m for m in messages]


def _arguments_as_text(messages: Messages) -> Messages:
    found = copy.deepcopy(messages)
    for message in found:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return found


def _in_parts(messages: Messages) -> Messages:
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]} if m["content"] is not None else m for m in messages
    ]


WAYS: dict[str, Callable[[Messages], Messages]] = {  # in which a row may be handed to transformers
    "as it is": lambda messages: messages,
    "content null beside calls": _without_content,
    "arguments as text": _arguments_as_text,
    "arguments as text, content null": lambda messages: _without_content(_arguments_as_text(messages)),
    "content in parts": _in_parts,
    "content in parts, arguments as text": lambda messages: _in_parts(_arguments_as_text(messages)),
}


@dataclass
class Reference:
    """A rendering by transformers: its text, which places each message wrote, what is missing in it.

    `said[n]` holds places in the UTF-8 bytes of the text, sorted; `wrote[n]` those before what a later message wrote.
    """

    way: str
    tools: Tools
    text: str
    wrote: dict[int, list[int]] = field(default_factory=dict)
    said: dict[int, list[int]] = field(default_factory=dict)
    missing: list[Leaf] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = self.text.encode()

    def before(self, turn: int) -> int:
        """Where the texts of the messages before a turn end; a template may write them in another order."""
        first = self.wrote[turn][0]
        places = (place for n, said in self.said.items() if n < turn for place in said if place < first)
        return max(places, default=-1) + 1

    def after(self, turn: int) -> int:
        """Where the text of the next message begins."""
        return min((p[0] for n, p in self.wrote.items() if n > turn and p), default=len(self.data))


class Oracle:
    """Renderings of one tokenizer's template, remembered."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, twin: str | None = None):
        self.tokenizer, self.added = tokenizer, added(tokenizer)
        self.marks_itself = bool(MARKS_ITSELF.search(str(tokenizer.chat_template)))
        self.twin = str(tokenizer.chat_template) if self.marks_itself else twin
        self.byte_level = b"ByteLevel" in tokenizer.backend_tokenizer.decoder.__getstate__()  # its JSON
        self._texts: dict[str, str | Exception] = {}
        self._references: dict[str, list[Reference]] = {}
        self._spans: dict[str, Any] = {}
        self.why = ""  # the last conversation could not be rendered
        tokens = sorted((re.escape(token.content) for token in self.added.values()), key=len, reverse=True)
        self.mark = re.compile("|".join(tokens) or r"(?!)")
        self.structure = self._structure()

    def _structure(self) -> set[int]:
        """The tokens by which the template tells turns apart: those of a plain conversation, and the ends of a text."""
        said: Messages = [{"role": "user", "content": "Anise"}, {"role": "assistant", "content": "Basil"}]
        texts = []
        for messages in (said, said * 2, [{"role": "system", "content": "Clove"}, *said], said[:1]):
            texts += self._plain(messages, prompt=len(messages) % 2 == 1)
        ends = [self.tokenizer.eos_token, self.tokenizer.bos_token]
        found = {n: t.content for n, t in self.added.items() if t.content in ends or any(t.content in s for s in texts)}
        return {number for number, token in found.items() if token in ends or not OPENING.match(token)}

    def _plain(self, messages: Messages, prompt: bool) -> list[str]:
        """Renderings of a plain conversation; where a template insists on tools, what follows its first words."""
        for tools in (None, [], SOME_TOOLS):
            texts = []
            for way in ("as it is", "content in parts"):
                with contextlib.suppress(Exception):  # a template is a program of its own
                    texts.append(self.render(messages, tools, way, prompt))
            if texts:
                return texts if tools is None else [text[max(text.find("Anise"), 0) :] for text in texts]
        return []

    def spelled(self) -> tuple[list[str], str]:
        """The marks of turns that a row can spell, and what would begin an answer."""
        return sorted(self.added[number].content for number in self.structure), self._asks()

    def header(self) -> str:
        """The header of an answer, from its last mark on."""
        asks = self._asks()
        return asks[max((match.start() for match in self.mark.finditer(asks)), default=len(asks)) :]

    def _asks(self) -> str:
        """What asks for an answer, between the end of a question and what the answer may open."""
        texts = self._plain([{"role": "user", "content": "Anise"}], prompt=True)
        prompt = texts[0].rpartition("Anise")[2] if texts else " "
        opening = OPENING.search(prompt)
        return prompt[: opening.start()] if opening else prompt

    def render(self, messages: Messages, tools: Tools, way: str, prompt: bool = False) -> str:
        """The text of `apply_chat_template`; raises whatever the template raises."""
        key = json.dumps([messages, tools, way, prompt], ensure_ascii=False)
        if key not in self._texts:
            try:
                self._texts[key] = self._render(WAYS[way](messages), tools, prompt)
            except Exception as error:  # a template is a program of its own
                self._texts[key] = error
        text = self._texts[key]
        if isinstance(text, Exception):
            raise text
        return text

    def _render(self, messages: Messages, tools: Tools, prompt: bool) -> str:
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        if all(message["content"] is not None for message in messages):
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        # transformers takes a null for a missing key before the template sees it, which asks for the null
        template = _compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
        return template.render(messages=messages, documents=None, **options, **self.tokenizer.special_tokens_map)

    def twin_spans(self, messages: Messages, tools: Tools, way: str) -> tuple[str, list[tuple[int, int]]]:
        """The twin's text and what its generation marks enclose, as places in the bytes of the text."""
        assert self.twin is not None
        key = json.dumps([messages, tools, way], ensure_ascii=False)
        if key not in self._spans:
            texts, spans = render_jinja_template(
                [WAYS[way](messages)], tools=tools, chat_template=self.twin, return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
            text = texts[0]
            self._spans[key] = text, [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans[0]]
        return self._spans[key]

    def references(self, messages: Messages, tools: Tools) -> list[Reference]:
        """The renderings that count as right: as the row is, or in the first way that loses less of it."""
        key = json.dumps([messages, tools], ensure_ascii=False)
        if key not in self._references:
            self._references[key] = list(self._choose(messages, tools))
        return self._references[key]

    def _choose(self, messages: Messages, tools: Tools) -> Iterator[Reference]:
        fewest: int | None = None
        for given in [tools] if tools else [None, []]:
            for way in WAYS:
                if way != "as it is" and WAYS[way](messages) == messages:
                    continue
                try:
                    reference = self.reference(messages, given, way)
                except Exception as error:
                    self.why = self.why if way != "as it is" else " ".join(f"{type(error).__name__}: {error}".split())
                    continue
                quoted = fewest is not None and way.startswith("arguments") and self._as_python(messages, given)
                if fewest is None or len(reference.missing) < fewest or quoted:
                    fewest = len(reference.missing)
                    yield reference
            if fewest is not None:
                return

    def _as_python(self, messages: Messages, tools: Tools) -> bool:
        """Whether the template writes arguments as Python shows a dict, which no parser of calls can read."""
        try:
            text = self.render(messages, tools, "as it is")
        except Exception:
            return False
        made = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
        return any(arguments and str(arguments) in text for arguments in made)

    def reference(self, messages: Messages, tools: Tools, way: str) -> Reference:
        reference = Reference(way, tools, self.render(messages, tools, way))
        for number in range(len(messages)):
            reference.said[number] = self.places(reference.text, messages, tools, way, number)
            reference.wrote[number] = reference.said[number]
        for number in range(len(messages)):  # what stands in a later message too was first written by this one
            later = min((places[0] for at, places in reference.wrote.items() if at > number and places), default=None)
            if later is not None:
                reference.wrote[number] = [place for place in reference.wrote[number] if place < later]
        reference.missing = [leaf for leaf in leaves(messages, tools) if self._misses(reference, messages, leaf)]
        return reference

    def places(
        self, text: str, messages: Messages, tools: Tools, way: str, number: int, prompt: bool = False
    ) -> list[int]:
        """The bytes of the text that a message wrote."""
        found: set[int] = set()
        for leaf in leaves(messages, None):
            if leaf[0] == number:
                places = self._differing(text, messages, leaf, tools, way, prompt)
                if leaf[2][-1] == "name" and len(messages) > number + 1:  # results may have it in their headers
                    alone = messages[: number + 1]
                    try:
                        places = places[: len(self._differing(self.render(alone, tools, way), alone, leaf, tools, way))]
                    except Exception:
                        places = []
                found |= set(places)
        return sorted(found)

    def _differing(
        self, text: str, messages: Messages, leaf: Leaf, tools: Tools, way: str, prompt: bool = False
    ) -> list[int]:
        other, _ = with_leaf(messages, None, leaf)
        try:
            changed = self.render(other, tools, way, prompt)
        except Exception:  # a template that asks for one of the tools' names, say
            return []
        at = [0]
        for character in text:
            at.append(at[-1] + len(character.encode()))
        if len(changed) == len(text):
            places = [n for n, pair in enumerate(zip(text, changed, strict=True)) if pair[0] != pair[1]]
        else:
            first = common(text, changed)
            last = common(text[first:][::-1], changed[first:][::-1])
            places = [n for n in range(first, len(text) - last) if not text[n].isspace()]
        return [place for n in places for place in range(at[n], at[n + 1])]

    def _misses(self, reference: Reference, messages: Messages, leaf: Leaf) -> bool:
        """Whether a text of the row is not written, or only because another place says the same."""
        value = str(at_leaf(messages, reference.tools, leaf)).strip()
        if not value:
            return False
        escaped = [json.dumps(value, ensure_ascii=flag)[1:-1] for flag in (False, True)]
        forms = [
            value,
            *escaped,
            repr(value)[1:-1],
            *(json.dumps(e)[1:-1] for e in escaped),
            value.replace('"', "&#34;"),
        ]
        pieces = [part.strip() for part in THINK_TAG.split(value)[::2]]
        if not any(form in reference.text for form in forms) and not all(piece in reference.text for piece in pieces):
            return True
        other, tools = with_leaf(messages, reference.tools, leaf)
        try:
            return self.render(other, tools, reference.way) == reference.text
        except Exception:
            return False

    def piece(self, number: int) -> bytes:
        """What a token stands for."""
        if number in self.added:
            return self.added[number].content.encode()
        token: Any = self.tokenizer.convert_ids_to_tokens(number)
        if self.byte_level:
            return bytes(BYTE_OF[letter] for letter in token) if all(c in BYTE_OF for c in token) else token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def align(self, ids: list[int], data: bytes) -> tuple[list[tuple[int, int]], list[int]]:
        """Where each token stands in a text, and the tokens that do not follow it any more."""
        spans: list[tuple[int, int]] = []
        place = 0
        for at, number in enumerate(ids):
            piece = self.piece(number)
            blanks = len(data[place:]) - len(data[place:].lstrip())
            before = self.added.get(ids[at - 1]) if at else None
            strips = number in self.added and self.added[number].lstrip or before is not None and before.rstrip
            if data.startswith(piece, place):
                end = place + len(piece)
            elif not self.byte_level and piece[:1] == b" " and data.startswith(piece[1:], place):
                end = place + len(piece) - 1  # the space that such a vocabulary puts in front
            elif blanks and strips and data.startswith(piece, place + blanks):
                end = place + blanks + len(piece)
            else:
                return spans, ids[at:]
            spans.append((place, end))
            place = end
        return spans, []
