"""Text to token ids, with the control tokens of a template kept apart from text that spells them.

What spells a control token in a message is hidden from the template behind private characters, and encoded as plain
text afterwards. Where a tokenizer allows it, prompt and answer are encoded apart, as generation would meet them. Others
(SentencePiece, which puts a space in front of every text) encode the whole, and the offsets of the tokens tell where it
is cut.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset.errors import RowError

PRIVATE_USE = range(0xF0000, 0x10FFFE)  # planes 15 and 16: they mean nothing, so a template has no opinion on them
NO_CHARACTER = "\U0010fffe"  # Unicode's promise: in no text. The names of control tokens have it
ASSISTANT_TEXTS = ("content", "reasoning_content")  # where a template's own tokens are tokens


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, cut into (text, supervised) stretches; `spelled` maps stand-ins to what they hide."""

    stretches: list[tuple[str, bool]]
    spelled: dict[str, str]
    alone: bool = False  # one turn of several, because the template rewrites earlier ones
    notes: tuple[str, ...] = ()
    begins_text: bool = False  # the ids of the tokenizer for the beginning of a text come first


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens, up to its last supervised one, and the control tokens that its text spells."""

    ids: np.ndarray  # int64 (L,)
    supervised: np.ndarray  # bool (L,)
    spelled: tuple[str, ...] = ()
    alone: bool = False  # as in RenderedChat
    notes: tuple[str, ...] = ()


class ControlTokens:
    """The control tokens of one tokenizer: special tokens and those that its template writes.

    Other added tokens (runs of spaces, HTML tags) are ordinary vocabulary and stay as the tokenizer has them. Those in
    `in_text` are tokens also where data spell them. Raises ValueError for one of these that is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, in_text: Collection[str] = ()):
        template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
        added, named = tokenizer.added_tokens_decoder, tokenizer.special_tokens_map.values()
        strangers = sorted(set(in_text) - {token.content for token in added.values()})
        if strangers:
            raise ValueError(
                f"text_tokens={','.join(strangers)}: no control token of the tokenizer {tokenizer.name_or_path!r}; add "
                "it to its tokenizer.json"
            )
        controls = {
            number: token
            for number, token in sorted(added.items(), key=lambda item: -len(item[1].content))  # the longest match wins
            if token.content.strip() and (token.special or token.content in template or token.content in named)
        }
        self.in_text = frozenset(in_text)
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}
        self.numbers = {token.content: number for number, token in controls.items()}
        self.pattern = self.matching(frozenset())
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.bool_)
        self._is_control[list(controls)] = True
        if tokenizer.unk_token_id is not None:
            self._is_control[tokenizer.unk_token_id] = False  # any text may hold what a vocabulary lacks

        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._ordinary = Tokenizer.from_str(json.dumps(backend))
        self._learn_to_rename(backend, controls)
        self.encodes_apart = self._keeps_pieces()
        whole, bare = (tokenizer(PIECE, add_special_tokens=flag)["input_ids"] for flag in (True, False))
        at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        self.beginning: list[int] = whole[:at]  # of any text

    def matching(self, allowed: frozenset[str]) -> re.Pattern[str]:
        """Matches every control token but the allowed ones."""
        if allowed not in self._patterns:
            contents = [re.escape(content) for content in self.numbers if content not in allowed]
            self._patterns[allowed] = re.compile("|".join(contents) or r"(?!)")
        return self._patterns[allowed]

    def hide(
        self, messages: list[Any], others: Any, own: frozenset[str], allowed: frozenset[str]
    ) -> tuple[list[Any], Any, dict[str, str]]:
        """Replaces each control token that the row's text spells by one private character that the row does not use.

        Those in `allowed` stay, and those in `own` in what the assistant says.
        """
        strings = list(strings_in([messages, others]))
        elsewhere = self.matching(allowed)
        found = {match for text in strings for match in elsewhere.findall(text)}
        if not found:
            return messages, others, {}
        used = {character for text in strings for character in text}
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(sorted(found), free, strict=False))
        if len(stand_ins) < len(found):
            raise RowError(
                "SPECIAL_TEXT", "the row uses all private characters, and a control token in its text needs one"
            )
        hidden: set[str] = set()

        def stand_in(pattern: re.Pattern[str]) -> Callable[[str], str]:
            def change(text: str) -> str:
                hidden.update(pattern.findall(text))
                return pattern.sub(lambda match: stand_ins[match[0]], text)

            return change

        def hide_in(message: dict[str, Any]) -> dict[str, Any]:
            speaks = self.matching(own | allowed) if message["role"] == "assistant" else elsewhere
            return {
                key: mapped(item, stand_in(speaks if key in ASSISTANT_TEXTS else elsewhere))
                for key, item in message.items()
            }

        messages, others = [hide_in(message) for message in messages], mapped(others, stand_in(elsewhere))
        return messages, others, {stand_in: token for token, stand_in in stand_ins.items() if token in hidden}

    def encode(self, chats: Sequence[RenderedChat]) -> Iterator[Sample | RowError]:
        """Yields the sample of each chat, or the reason why its tokens would not be what its text says."""
        texts = [self._texts_of(chat) for chat in chats]
        pieces = texts if self.encodes_apart else [["".join(each)] for each in texts]
        encoded: dict[Tokenizer, Iterator[Any]] = {}
        for tokenizer in (self._ordinary, self._renaming):
            own = [chat_pieces for chat, chat_pieces in zip(chats, pieces, strict=True) if self._by(chat) is tokenizer]
            encode = tokenizer.encode_batch_fast if self.encodes_apart else tokenizer.encode_batch  # has offsets
            encoded[tokenizer] = iter(encode([piece for each in own for piece in each], add_special_tokens=False))
        for chat, stretches, each in zip(chats, texts, pieces, strict=True):
            encodings = [next(encoded[self._by(chat)]) for _ in each]
            flags = [supervised for _, supervised in chat.stretches]
            ids = [number for encoding in encodings for number in encoding.ids]
            if self.encodes_apart:
                mask = [flag for flag, each in zip(flags, encodings, strict=True) for _ in each.ids]
            else:
                mask = mask_of(encodings[0].offsets, [len(text) for text in stretches], flags)
            yield self._sample(chat, np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_))

    def _sample(self, chat: RenderedChat, ids: np.ndarray, mask: np.ndarray) -> Sample | RowError:
        if chat.spelled:
            ids = self._numbers_of_renamed[ids]
        text = "".join(text for text, _ in chat.stretches)
        if chat.spelled and NO_CHARACTER in text:
            return RowError("SPECIAL_TEXT", "the text holds U+10FFFE, which is no character, beside a control token")
        written = np.array([self.numbers[token] for token in self.pattern.findall(text)], dtype=np.int64)
        if not np.array_equal(ids[self._is_control[ids]], written):
            return RowError("SPECIAL_TEXT", "this tokenizer cannot keep text apart from the control token it spells")
        if chat.begins_text and self.beginning:
            ids = np.concatenate([np.array(self.beginning, dtype=np.int64), ids])
            mask = np.concatenate([np.zeros(len(self.beginning), dtype=np.bool_), mask])
        return Sample(ids, mask, tuple(sorted(chat.spelled.values())), chat.alone, chat.notes)

    def _by(self, chat: RenderedChat) -> Tokenizer:
        """A row that spells no control token is encoded as the tokenizer would anywhere else."""
        return self._renaming if chat.spelled else self._ordinary

    def _texts_of(self, chat: RenderedChat) -> list[str]:
        """The stretches as they are encoded: the row's own words restored, and the control tokens renamed."""
        texts = [text for text, _ in chat.stretches]
        if not chat.spelled:
            return texts
        restore = str.maketrans(chat.spelled)
        return [self.pattern.sub(lambda match: self._names[match[0]], text).translate(restore) for text in texts]

    def _learn_to_rename(self, backend: dict[str, Any], controls: dict[int, Any]) -> None:
        """A copy of the tokenizer whose control tokens have names that no text spells, and the way to their ids."""
        self._names = {content: f"{NO_CHARACTER}{at}{NO_CHARACTER}" for at, content in enumerate(self.numbers)}
        originals = {}
        for token in backend["added_tokens"]:
            name = self._names.get(token["content"], token["content"]) if token["id"] in controls else token["content"]
            originals[name] = token["id"]
            token["content"] = name
        backend = {**backend, "post_processor": None}
        self._renaming = Tokenizer.from_str(json.dumps(backend))
        size = max(self._renaming.get_vocab(with_added_tokens=True).values()) + 1
        self._numbers_of_renamed = np.arange(max(size, len(self._is_control)), dtype=np.int64)
        for name, number in originals.items():
            self._numbers_of_renamed[self._renaming.token_to_id(name)] = number

    def _keeps_pieces(self) -> bool:
        """Whether a text may be cut and its parts encoded apart: nothing is put in front of each, and none shrinks."""
        decoded = self._ordinary.decode(2 * self._ordinary.encode(PIECE, add_special_tokens=False).ids)
        return bool(decoded.lower() == 2 * PIECE)


PIECE = "a b"


def mask_of(offsets: list[tuple[int, int]], lengths: list[int], flags: list[bool]) -> list[bool]:
    """For tokens with these (start, end) in a text whether they hold a character of a stretch that is supervised.

    The stretches, of these lengths, follow each other; a token of no character belongs to the one after it.
    """
    trained = np.repeat(np.array([*flags, False]), [*lengths, 1])
    before = np.concatenate([[0], np.cumsum(trained)])  # supervised characters before each place
    return [bool(before[max(end, min(start + 1, len(trained)))] > before[start]) for start, end in offsets]


def refuse_escaped(whole: str, spelled: dict[str, str]) -> None:
    """Raises RowError where a template has escaped the stand-ins, which could then not be found again."""
    for stand_in, token in spelled.items():
        if any(escaped in whole for escaped in (json.dumps(stand_in)[1:-1], repr(stand_in)[1:-1], quote(stand_in))):
            raise RowError("SPECIAL_TEXT", f"the template escapes characters next to {token!r} in the text")


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its strings changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list) else value


def strings_in(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
