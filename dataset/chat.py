"""Conversations to token ids and their loss mask, through the tokenizer's own chat template.

The mask is right by construction. The template renders the messages up to each assistant turn, and what it adds from
the generation prompt to the end-of-turn token is what the model will have to write, so exactly that is supervised. No
marker is searched for in the user's text: what spells a control token there is hidden from the template behind private
characters and encoded as plain text afterwards. Prompt and answer are encoded apart, as generation would meet them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset.reader import Conversation, Message, RowError

GREEN, RESET = "\x1b[32m", "\x1b[0m"
PRIVATE_USE = range(0xF0000, 0x10FFFE)  # planes 15 and 16: assigned to nobody, so a template has no opinion on them


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text that is supervised as a whole or not at all."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as alternating segments, the last one supervised; `spelled` maps stand-ins to what they hide."""

    segments: list[Segment]
    spelled: dict[str, str]


Sample = tuple[np.ndarray, np.ndarray]  # token ids int64 (L,), supervised bool (L,)


class ChatRenderer:
    """Renders and encodes conversations for one tokenizer; raises ValueError for a tokenizer that cannot serve."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template")
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
        self._tokenizer = tokenizer
        self._set_control_tokens()
        self._check_pieces()
        self.end_of_turn = self._find_end_of_turn()
        self.end_of_turn_id: int = self._ids_of_controls[self.end_of_turn]

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Sample:
        """Returns ids (L,) and supervised mask (L,) of one conversation; raises RowError when there is no right mask."""
        sample = next(self.encode([self.segments(messages, tools)]))
        if isinstance(sample, RowError):
            raise sample
        return sample

    def render_batch(self, conversations: Sequence[Conversation]) -> list[tuple[Sample, list[str]] | RowError]:
        """Renders many conversations at once; for each its sample and the control tokens that its text spells."""
        results: list[Any] = []
        for conversation in conversations:
            try:
                results.append(self.segments(conversation.messages, conversation.tools))
            except RowError as error:
                results.append(error)
        chats = [result for result in results if isinstance(result, RenderedChat)]
        samples = self.encode(chats)
        for index, chat in enumerate(results):
            if isinstance(chat, RenderedChat):
                sample = next(samples)
                results[index] = sample if isinstance(sample, RowError) else (sample, list(chat.spelled.values()))
        return results

    def segments(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> RenderedChat:
        """Renders a conversation up to the end of its last assistant turn, cut where supervision begins and ends."""
        messages, tools, spelled = self._hide_spelled(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._apply(messages[: turns[-1] + 1], tools)
        segments, done = [], 0
        for turn in turns:
            prompt = self._prefix(messages[:turn], tools, whole, generation_prompt=True)
            # Without the bound, a turn that the template leaves open would reach into the next message.
            upto = self._prefix(messages[: turn + 1], tools, whole) if turn != turns[-1] else whole
            end = whole.find(self.end_of_turn, len(prompt), len(upto))
            if end < 0:
                problem = f"the template does not end message {turn} with {self.end_of_turn!r}"
                raise RowError("NO_END_OF_TURN", problem)
            end += len(self.end_of_turn)
            segments += [Segment(whole[done : len(prompt)], False), Segment(whole[len(prompt) : end], True)]
            done = end
        self._check_stand_ins(whole, spelled)
        return RenderedChat(segments, spelled)

    def encode(self, chats: Sequence[RenderedChat]) -> Iterator[Sample | RowError]:
        """Yields ids and mask of each chat, or the reason why its text does not survive as text."""
        pieces = [list(self._pieces(segment.text, chat.spelled)) for chat in chats for segment in chat.segments]
        ordinary = iter(
            self._encode(self._ordinary, [piece for parts in pieces for piece, kind in parts if kind == "ordinary"])
        )
        literal = iter(
            self._encode(self._literal, [piece for parts in pieces for piece, kind in parts if kind == "literal"])
        )
        encoded = iter(pieces)
        for chat in chats:
            ids: list[int] = []
            mask: list[bool] = []
            expected = 0
            for segment in chat.segments:
                before = len(ids)
                for piece, kind in next(encoded):
                    if kind == "control":
                        ids.append(self._ids_of_controls[piece.strip()])
                    else:
                        ids += next(ordinary if kind == "ordinary" else literal)
                mask += [segment.supervised] * (len(ids) - before)
                expected += len(self._control.findall(segment.text))
            sample = np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_)
            if int(self._is_control[sample[0]].sum()) != expected:
                yield RowError(
                    "SPECIAL_TEXT", "text that spells a control token cannot be encoded as text by this tokenizer"
                )
            else:
                yield sample

    def _set_control_tokens(self) -> None:
        """Collects what must never come out of a message's text: special tokens and those that the template writes.

        Other added tokens (runs of spaces, HTML tags) are ordinary vocabulary and stay as the tokenizer has them.
        """
        template = json.dumps(self._tokenizer.chat_template, ensure_ascii=False)
        added = self._tokenizer.added_tokens_decoder
        controls = {
            id_: token
            for id_, token in added.items()
            if token.content.strip() and (token.special or token.content in template)
        }
        self._ids_of_controls = {token.content: id_ for id_, token in controls.items()}
        alternatives = []
        for token in sorted(controls.values(), key=lambda token: -len(token.content)):
            alternatives.append(r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip)
        self._control = re.compile("|".join(alternatives))
        self._spelling = re.compile("|".join(map(re.escape, sorted(self._ids_of_controls, key=len, reverse=True))))
        self._is_control = np.zeros(
            max(max(added), self._tokenizer.backend_tokenizer.get_vocab_size()) + 1, dtype=np.bool_
        )
        self._is_control[list(controls)] = True

        backend = json.loads(self._tokenizer.backend_tokenizer.to_str())
        backend["truncation"] = backend["padding"] = None
        self._ordinary = Tokenizer.from_str(json.dumps(backend))
        for token in backend["added_tokens"]:
            token["special"] = token["id"] in controls
        self._literal = Tokenizer.from_str(json.dumps(backend))
        self._literal.encode_special_tokens = True  # the same tokenizer, blind to control tokens

    def _check_pieces(self) -> None:
        """Refuses tokenizers that put a space in front of every piece: segments could not be encoded apart."""
        text = "a b"
        ids = self._encode(self._ordinary, [text])[0]
        decoded = self._ordinary.decode(ids + ids, skip_special_tokens=False)
        if decoded.lower() != text + text:
            raise ValueError(
                f"the tokenizer {self._tokenizer.name_or_path!r} reads {text + text!r} back as {decoded!r} when it is "
                "encoded in two pieces, so prompts and answers cannot be encoded apart"
            )

    def _find_end_of_turn(self) -> str:
        """Returns the end-of-sequence token, or what the template ends a turn with when that is another control token."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            turn = self._apply(probe, None)[len(self._apply(probe[:1], None, generation_prompt=True)) :]
        except RowError as error:
            raise ValueError(f"the chat template fails on a plain question and answer: {error}") from error
        written = self._spelling.findall(turn)
        return written[0] if written and self._tokenizer.eos_token not in written else self._tokenizer.eos_token

    def _apply(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            raise RowError("TEMPLATE", f"the chat template failed: {type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _prefix(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, whole: str, generation_prompt: bool = False
    ) -> str:
        """Renders the first messages and checks that the whole conversation begins with the same text."""
        text = self._apply(messages, tools, generation_prompt)
        if not whole.startswith(text):
            at = next(
                (i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole))
            )
            raise RowError(
                "UNSTABLE_TEMPLATE",
                f"the chat template renders the first {len(messages)} messages differently when more follow; first "
                f"difference at character {at}: {text[at : at + 40]!r} alone, {whole[at : at + 40]!r} in the conversation",
            )
        return text

    def _hide_spelled(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[Any, Any, dict[str, str]]:
        """Replaces each control token that the row's text spells by one private character that the row does not use."""
        strings = list(_strings([messages, tools]))
        found = {match for text in strings for match in self._spelling.findall(text)}
        if not found:
            return messages, tools, {}
        used = {ord(character) for text in strings for character in text if ord(character) >= PRIVATE_USE.start}
        free = (chr(code) for code in PRIVATE_USE if code not in used)
        hidden = dict(zip(sorted(found), free, strict=False))

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self._spelling.sub(lambda match: hidden[match[0]], value)
            if isinstance(value, dict):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        return hide(messages), hide(tools), {stand_in: token for token, stand_in in hidden.items()}

    def _check_stand_ins(self, whole: str, spelled: dict[str, str]) -> None:
        """Refuses a template that escapes the stand-ins, because their escapes would be trained as text."""
        for stand_in, token in spelled.items():
            if json.dumps(stand_in)[1:-1] in whole:
                raise RowError("SPECIAL_TEXT", f"the template escapes text beyond ASCII next to {token!r}")

    def _pieces(self, text: str, spelled: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Cuts a segment into (piece, kind): control tokens of the template, and literal text between them.

        A row that spells no control token is one ordinary piece, encoded as the tokenizer would anywhere else.
        """
        if not spelled:
            yield text, "ordinary"
            return
        done = 0
        restore = str.maketrans(spelled)
        for match in self._control.finditer(text):
            if match.start() > done:
                yield text[done : match.start()].translate(restore), "literal"
            yield match[0], "control"
            done = match.end()
        if done < len(text):
            yield text[done:].translate(restore), "literal"

    @staticmethod
    def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def show(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the text of a sample with its supervised tokens in green, for a person at a terminal."""
    cuts = np.flatnonzero(np.diff(supervised.astype(np.int8))) + 1
    parts = []
    for run, mask in zip(np.split(ids, cuts), np.split(supervised, cuts), strict=True):
        text = tokenizer.decode(run.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"{GREEN}{text}{RESET}" if mask[0] else text)
    return "".join(parts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
