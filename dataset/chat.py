"""Conversations to token ids and their loss mask, through the tokenizer's own chat template.

The mask is right by construction. The template renders the messages up to each assistant turn, and what it adds from
the generation prompt to the end-of-turn token is what the model will have to write: exactly that is supervised. No
marker is searched for in the user's text: what spells a control token there is hidden from the template behind private
characters and encoded as plain text afterwards. Prompt and answer are encoded apart, as generation would meet them.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset.files import RowError
from dataset.reader import Conversation, Message, UnsafeDataError
from dataset.template import ChatTemplate, Rendering, Tools, limits

GREEN, RESET = "\x1b[32m", "\x1b[0m"
TRAIN_ON = ("assistant", "last", "marked", "all")
PRIVATE_USE = range(0xF0000, 0x10FFFE)  # planes 15 and 16: they mean nothing, so a template has no opinion on them


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, cut into (text, supervised) stretches; `spelled` maps stand-ins to what they hide."""

    stretches: list[tuple[str, bool]]
    spelled: dict[str, str]
    alone: bool = False  # one turn of several, because the template rewrites earlier ones


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens, up to its last supervised one, and the control tokens that its text spells."""

    ids: np.ndarray  # int64 (L,)
    supervised: np.ndarray  # bool (L,)
    spelled: tuple[str, ...] = ()
    alone: bool = False  # as in RenderedChat


class ChatRenderer:
    """Renders and encodes conversations for one tokenizer; raises ValueError for a tokenizer that cannot serve."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, train_on: str = "assistant", *, text_tokens: tuple[str, ...] = (),
        vanished: str = "error", template_date: str | None = None,
    ):  # fmt: skip
        """`train_on`: assistant turns, the last of them, those marked by `train` or `weight`, or all tokens."""
        for needed in ("chat_template", "eos_token"):
            if getattr(tokenizer, needed) is None:
                raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no {needed}")
        self._tokenizer, self._train_on, self._template = tokenizer, train_on, ChatTemplate(tokenizer)
        if template_date:
            self._template._variables["strftime_now"] = datetime.fromisoformat(template_date).strftime
        self._learn_control_tokens()
        self._check_pieces()
        self.end_of_turn = self._find_end_of_turn()

    @property
    def end_ids(self) -> set[int]:
        """The tokens that an answer can end with."""
        return {self._tokenizer.eos_token_id, self._tokenizer.convert_tokens_to_ids(self.end_of_turn)}

    def render(self, messages: list[Message], tools: Tools = None) -> Sample:
        """Renders one conversation as one sample; raises RowError when there is no right mask for it."""
        conversation = Conversation(0, messages, tools)
        with limits():
            chat = self._render_turns(conversation, self._trained_turns(conversation))
        (sample,) = self._encode([chat])
        if isinstance(sample, RowError):
            raise sample
        return sample

    def render_batch(self, conversations: Sequence[Conversation]) -> list[list[Sample] | RowError]:
        """Renders many conversations, each to its samples or to the reason why there is none."""
        chats: list[list[RenderedChat] | RowError] = []
        for conversation in conversations:
            try:
                with limits():
                    chats.append(self._render_text(conversation))
            except RowError as error:
                chats.append(error)
            except UnsafeDataError as error:  # ends all: the next row would take as long
                raise UnsafeDataError(f"line {conversation.line}: {error}") from None
        encoded = self._encode([chat for rendered in chats if isinstance(rendered, list) for chat in rendered])
        results: list[list[Sample] | RowError] = []
        for rendered in chats:
            if isinstance(rendered, list):
                samples = [next(encoded) for _ in rendered]
                errors = [sample for sample in samples if isinstance(sample, RowError)]
                results.append(errors[0] if errors else [sample for sample in samples if isinstance(sample, Sample)])
            else:
                results.append(rendered)
        return results

    def _render_text(self, conversation: Conversation) -> list[RenderedChat]:
        """One sample; or one for each turn to train, where the template rewrites what it has rendered before."""
        if conversation.text is not None:
            hidden, _, spelled = self._hide_spelled([conversation.text], None)
            return [RenderedChat([(hidden[0], True), (str(self._tokenizer.eos_token), True)], spelled)]
        trained = self._trained_turns(conversation)
        try:
            return [self._render_turns(conversation, trained)]
        except RowError as error:
            if error.code != "UNSTABLE_TEMPLATE":
                raise
            if self._train_on == "all" and False not in conversation.wishes.values():  # wherever turns begin and end
                return [self._render_turns(conversation, trained, cuts=())]
            return [self._render_turns(conversation, [turn], cuts=[turn]) for turn in trained]

    def _trained_turns(self, conversation: Conversation) -> list[int]:
        """Numbers of the assistant messages to train; a message's own wish outranks the option."""
        turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        wanted = {"last": turns[-1:], "marked": []}.get(self._train_on, turns)
        trained = [turn for turn in turns if conversation.wishes.get(turn, turn in wanted)]
        if not trained and self._train_on != "all":
            raise RowError("NO_SUPERVISED", f"no turn is to be trained (train_on={self._train_on})")
        return trained

    def _render_turns(
        self, conversation: Conversation, trained: list[int], cuts: Sequence[int] | None = None
    ) -> RenderedChat:
        """Renders up to the last turn to train and cuts where supervision begins and ends.

        With `cuts`, nowhere but at those turns, so that a template may render the others as it likes.
        """
        messages, tools, spelled = self._hide_spelled(conversation.messages, conversation.tools)
        if self._train_on != "all":
            messages = messages[: trained[-1] + 1]
        rendering = self._template.rendering(messages, tools)
        stretches = self._cut(messages, rendering, trained, cuts)
        if self._train_on == "all":  # what lies between the turns and after them too
            rest = rendering.text[sum(len(text) for text, _ in stretches) :]
            stretches = [(text, flag or at % 2 == 0) for at, (text, flag) in enumerate([*stretches, (rest, False)])]
        self._refuse_escaped(rendering.text, spelled)
        return RenderedChat(stretches, spelled, alone=bool(cuts))

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Returns the ids after which the model writes its next message, as training has them before that answer.

        Where the template renders earlier answers otherwise than they were written, the text is encoded in one piece.
        """
        messages, tools, spelled = self._hide_spelled(messages, tools)
        with limits():
            rendering = self._template.rendering(messages, tools, generation_prompt=True)
            whole = rendering.text
            try:
                stretches = self._cut(messages, rendering, ())
            except RowError:
                stretches = []
        self._refuse_escaped(whole, spelled)
        done = sum(len(text) for text, _ in stretches)
        (sample,) = self._encode([RenderedChat([*stretches, (whole[done:], False)], spelled)])
        if isinstance(sample, RowError):
            raise sample
        return sample.ids.tolist()

    def _cut(
        self,
        messages: list[Message],
        rendering: Rendering,
        trained: Collection[int],
        cuts: Sequence[int] | None = None,
    ) -> list[tuple[str, bool]]:
        """Cuts the rendered messages at their assistant turns, or at `cuts`, and ends with the last cut.

        What a turn adds, from the generation prompt to the last end-of-turn token, is supervised, or what the template
        itself marks by `{% generation %}`. What lies between is every second stretch, beginning with the first.
        """
        whole, stretches, done = rendering.text, [], 0
        if cuts is None:
            cuts = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in cuts:
            start = rendering.prefix_length(turn, generation_prompt=True)
            # Rendered as the last one, each turn must read as it does with the others after it, or it is another text
            # that the model would have to write; and a turn that the template leaves open must not reach into the next.
            last = turn == len(messages) - 1
            bound = len(whole) if last else rendering.prefix_length(turn + 1)
            spans = [span for span in rendering.marked if done <= span[0] < bound]
            if not rendering.marked:
                end = whole.rfind(self.end_of_turn, start, bound)
                if end < 0:
                    said = f"the template does not end message {turn} with {self.end_of_turn!r}"
                    raise RowError("NO_END_OF_TURN", said)
                spans = [(start, end + len(self.end_of_turn))]
            for start, end in spans:
                stretches += [(whole[done:start], False), (whole[start:end], turn in trained)]
                done = end
        return stretches

    def _refuse_escaped(self, whole: str, spelled: dict[str, str]) -> None:
        for stand_in, token in spelled.items():
            if any(escaped in whole for escaped in (json.dumps(stand_in)[1:-1], repr(stand_in)[1:-1])):
                raise RowError("SPECIAL_TEXT", f"the template escapes characters next to {token!r} in the text")

    def _learn_control_tokens(self) -> None:
        """Collects what must never come out of a message's text: special tokens and those that the template writes.

        Other added tokens (runs of spaces, HTML tags) are ordinary vocabulary and stay as the tokenizer has them.
        """
        template = json.dumps(self._tokenizer.chat_template, ensure_ascii=False)
        added = self._tokenizer.added_tokens_decoder
        controls = {
            number: token
            for number, token in sorted(added.items(), key=lambda item: -len(item[1].content))  # the longest match wins
            if token.content.strip() and (token.special or token.content in template)
        }
        self._numbers = {token.content: number for number, token in controls.items()}
        self._control = re.compile("|".join(re.escape(token.content) for token in controls.values()))
        self._control_and_space = re.compile(
            "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in controls.values())
        )
        self._is_control = np.zeros(max(self._tokenizer.get_vocab().values()) + 1, dtype=np.bool_)
        self._is_control[list(controls)] = True
        if self._tokenizer.unk_token_id is not None:
            self._is_control[self._tokenizer.unk_token_id] = False  # any text may hold what a vocabulary lacks

        backend = json.loads(self._tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._ordinary = Tokenizer.from_str(json.dumps(backend))
        for token in backend["added_tokens"]:
            token["special"] = token["id"] in controls
        self._literal = Tokenizer.from_str(json.dumps(backend))
        self._literal.encode_special_tokens = True  # the same tokenizer, blind to control tokens

    def _check_pieces(self) -> None:
        """Refuses tokenizers that put a space in front of every piece: stretches could not be encoded apart."""
        text = "a b"
        decoded = self._ordinary.decode(2 * self._ordinary.encode(text, add_special_tokens=False).ids)
        if decoded.lower() != 2 * text:
            raise ValueError(
                f"the tokenizer {self._tokenizer.name_or_path!r} reads {text!r} twice as {decoded!r}: it changes "
                "the start of a piece, so prompts and answers cannot be encoded apart"
            )

    def _find_end_of_turn(self) -> str:
        """Returns the end-of-sequence token, or what the template ends a turn with if that is another control token."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            with limits():
                header = self._template.render(probe[:1], generation_prompt=True)
                turn = self._template.render(probe)[len(header) :]
        except RowError as error:
            raise ValueError(f"a plain question and answer cannot be rendered: {error}") from error
        written, eos = self._control.findall(turn), str(self._tokenizer.eos_token)
        return eos if eos in written or not written else str(written[0])

    def _hide_spelled(self, messages: list[Message], tools: Tools) -> tuple[Any, Any, dict[str, str]]:
        """Replaces each control token that the row's text spells by one private character that the row does not use."""
        strings = list(_strings([messages, tools]))
        found = {match for text in strings for match in self._control.findall(text)}
        if not found:
            return messages, tools, {}
        used = {character for text in strings for character in text}
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(sorted(found), free, strict=False))

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(lambda match: stand_ins[match[0]], value)
            if isinstance(value, dict):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        return hide(messages), hide(tools), {stand_in: token for token, stand_in in stand_ins.items()}

    def _encode(self, chats: Sequence[RenderedChat]) -> Iterator[Sample | RowError]:
        """Yields the sample of each chat; ids and mask grow together, stretch by stretch."""
        cut = [[list(self._pieces(text, chat.spelled)) for text, _ in chat.stretches] for chat in chats]
        pieces = [piece for chat in cut for stretch in chat for piece in stretch]
        encoded: dict[Tokenizer, Iterator[Any]] = {
            tokenizer: iter(
                tokenizer.encode_batch_fast([text for text, by in pieces if by is tokenizer], add_special_tokens=False)
            )
            for tokenizer in (self._ordinary, self._literal)
        }
        for chat, stretches in zip(chats, cut, strict=True):
            ids: list[int] = []
            mask: list[bool] = []
            for (_, supervised), stretch in zip(chat.stretches, stretches, strict=True):
                for text, by in stretch:
                    ids += [self._numbers[text]] if by is None else next(encoded[by]).ids
                mask += [supervised] * (len(ids) - len(mask))
            sample = Sample(np.array(ids), np.array(mask), tuple(sorted(chat.spelled.values())), chat.alone)
            written = [self._numbers[token] for text, _ in chat.stretches for token in self._control.findall(text)]
            if not np.array_equal(self._controls_among(sample.ids), self._controls_among(np.array(written, dtype=int))):
                yield RowError("SPECIAL_TEXT", "this tokenizer cannot keep text apart from the control token it spells")
            else:
                yield sample

    def _controls_among(self, ids: np.ndarray) -> np.ndarray:
        return ids[self._is_control[ids]]

    def _pieces(self, text: str, spelled: dict[str, str]) -> Iterator[tuple[str, Tokenizer | None]]:
        """Cuts a stretch into pieces and says which tokenizer encodes each; None marks the template's control tokens.

        A row that spells no control token is one piece, encoded as the tokenizer would anywhere else.
        """
        if not spelled:
            yield text, self._ordinary
            return
        restore, done = str.maketrans(dict(spelled)), 0
        for match in self._control_and_space.finditer(text):
            yield text[done : match.start()].translate(restore), self._literal
            yield self._control.findall(match[0])[0], None
            done = match.end()
        yield text[done:].translate(restore), self._literal


def show(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the text of a sample with its supervised tokens in green, for a person at a terminal.

    Control characters, with which text of the data could command the terminal, are spelled out.
    """
    parts = []
    for text, is_supervised in texts_of(ids, supervised, tokenizer):
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
        parts.append(f"{GREEN}{text}{RESET}" if is_supervised else text)
    return "".join(parts)


def texts_of(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, bool]]:
    """Yields the (text, supervised) stretches of a sample."""
    cuts = np.flatnonzero(np.diff(supervised.astype(np.int8))) + 1
    for run, mask in zip(np.split(ids, cuts), np.split(supervised, cuts), strict=True):
        text: Any = tokenizer.decode(run.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text, bool(mask[0])


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
