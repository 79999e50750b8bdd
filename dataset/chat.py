"""Conversations to token ids and their loss mask, through the tokenizer's own chat template.

The mask is right by construction. The template renders the messages up to each assistant turn, and what it adds from
the header of the answer to what closes the turn is what the model will have to write: exactly that is supervised. No
marker is searched for in anybody's text; where header and end are, the template has shown (dataset/traits.py).
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset.control_tokens import ControlTokens, RenderedChat, Sample, mapped, refuse_escaped, strings_in
from dataset.cuts import cut
from dataset.errors import RowError, UnsafeDataError
from dataset.reader import Conversation, Message
from dataset.template import ChatTemplate, Rendering, Request, Tools
from dataset.traits import Traits, find_traits
from dataset.vanished import NEVER_TRAINED, missing_from

GREEN, RESET = "\x1b[32m", "\x1b[0m"
TRAIN_ON = ("assistant", "last", "marked", "all")
PIECE_OF_TOKEN = re.compile(r"[<>|｜\[\]]")
TRAITS_KEPT = 256
MESSAGES_RENDERED = 500_000  # for one row, by a template that has to be run anew for each turn


class ChatRenderer:
    """Renders and encodes conversations for one tokenizer; raises ValueError for a tokenizer that cannot serve."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, train_on: str = "assistant", *, text_tokens: Sequence[str] = (),
        vanished: str = "error", template_date: str | None = None,
    ):  # fmt: skip
        """`train_on`: assistant turns, the last of them, those marked by `train` or `weight`, or all tokens.

        `text_tokens`: control tokens that are tokens also where data spell them. `template_date`: today, for templates
        that write it.
        """
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token")
        self._tokenizer, self._train_on, self._vanished = tokenizer, train_on, vanished
        self._tokens = ControlTokens(tokenizer, text_tokens)
        self._template = ChatTemplate(tokenizer, template_date)
        self._known_traits: dict[tuple[bool, str], Traits] = {}
        reserved = set(self._template.special_tokens)
        if tokenizer.chat_template is not None:
            self._refuse_useless_template()
            reserved.update(*(traits.structural for traits in self._usual_traits()))
        if reserved := reserved.intersection(text_tokens):
            raise ValueError(
                f"text_tokens={','.join(sorted(reserved))}: the chat template marks roles or the ends of turns by it, "
                "and text must not"
            )

    @property
    def end_ids(self) -> set[int]:
        """The tokens that an answer can end with."""
        numbers = self._tokens.numbers
        return {self._tokenizer.eos_token_id, *(numbers[end] for end in self._ends() if end in numbers)}

    @property
    def end_texts(self) -> list[str]:
        """The texts that an answer can end with, where the template closes turns by text."""
        return [end for end in self._ends() if end not in self._tokens.numbers]

    def _ends(self) -> list[str]:
        if self._tokenizer.chat_template is None:
            return []
        endings = [ending for traits in self._usual_traits() for ending in (traits.answer, traits.call)]
        return list(dict.fromkeys(ending.token for ending in endings if ending))

    @property
    def end_of_turn(self) -> str:
        """The control token that closes an answer; where text does, the one that ends all."""
        endings = [traits.answer for traits in self._usual_traits() if traits.answer]
        token = endings[0].token if endings else ""
        return token if token in self._tokens.numbers else str(self._tokenizer.eos_token)

    def render(self, messages: list[Message], tools: Tools = None) -> Sample:
        """Renders one conversation as one sample; raises RowError when there is no right mask for it."""
        self._template.spent = 0.0
        conversation = Conversation(0, messages, tools)
        chat = self._render_turns(conversation, self._trained_turns(conversation))
        (sample,) = self._tokens.encode([chat])
        if isinstance(sample, RowError):
            raise sample
        return sample

    def render_batch(self, conversations: Sequence[Conversation]) -> list[list[Sample] | RowError]:
        """Renders many conversations, each to its samples or to the reason why there is none."""
        chats: list[list[RenderedChat] | RowError] = []
        for conversation in conversations:
            self._template.spent = 0.0
            try:
                chats.append(self._render_text(conversation))
            except RowError as error:
                chats.append(error)
            except UnsafeDataError as error:  # ends all: the next row would take as long
                raise UnsafeDataError(f"line {conversation.line}: {error}") from None
        encoded = self._tokens.encode([chat for rendered in chats if isinstance(rendered, list) for chat in rendered])
        results: list[list[Sample] | RowError] = []
        for rendered in chats:
            if isinstance(rendered, list):
                samples = [next(encoded) for _ in rendered]
                errors = [sample for sample in samples if isinstance(sample, RowError)]
                results.append(errors[0] if errors else [sample for sample in samples if isinstance(sample, Sample)])
            else:
                results.append(rendered)
        return results

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Returns the ids after which the model writes its next message, as training has them before that answer.

        Where the template renders earlier answers otherwise than they were written, the text is encoded in one piece.
        """
        self._template.spent = 0.0
        traits = self._traits(tools, {})
        messages, tools, spelled = self._hide(messages, tools, traits)
        rendering = self._template.rendering(messages, Request(tools, {}, traits.form), generation_prompt=True)
        whole = rendering.text
        try:
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            stretches = cut(rendering, traits, (), turns)
        except RowError:
            stretches = []
        refuse_escaped(whole, spelled)
        done = sum(len(text) for text, _ in stretches)
        (sample,) = self._tokens.encode([RenderedChat([*stretches, (whole[done:], False)], spelled)])
        if isinstance(sample, RowError):
            raise sample
        ids: list[int] = sample.ids.tolist()
        return ids

    def _refuse_useless_template(self) -> None:
        """Raises ValueError where neither with tools nor without a question and its answer can be rendered."""
        problems = [traits.problem for traits in self._usual_traits()]
        if all(problems):
            raise ValueError(f"a plain question and answer cannot be rendered: {problems[0]}")

    def _usual_traits(self) -> list[Traits]:
        """Of conversations without tools and with some."""
        return [self._traits(tools, {}) for tools in (None, [{}])]

    def _traits(self, tools: Tools, variables: dict[str, Any]) -> Traits:
        if self._tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer {self._tokenizer.name_or_path!r} has no chat_template")
        unread = self._template.unread(variables, tools) if variables else ()
        read = {name: value for name, value in variables.items() if name not in unread}
        key = bool(tools), json.dumps(read, sort_keys=True) if read else ""
        if key not in self._known_traits:
            if len(self._known_traits) >= TRAITS_KEPT:  # variables may differ from row to row
                self._known_traits.clear()
            found = find_traits(self._template, bool(tools), read, self._tokens.pattern)
            self._known_traits[key] = found
        return self._known_traits[key]

    def _hide(self, messages: list[Message], others: Any, traits: Traits) -> tuple[Any, Any, dict[str, str]]:
        return self._tokens.hide(messages, others, traits.own, self._tokens.in_text)

    def _render_text(self, conversation: Conversation) -> list[RenderedChat]:
        """One sample; or one for each turn to train, where the template rewrites what it has rendered before."""
        if conversation.text is not None:
            _, hidden, spelled = self._tokens.hide([], conversation.text, frozenset(), self._tokens.in_text)
            ends = [(hidden, True), (str(self._tokenizer.eos_token), True)]
            return [RenderedChat(ends, spelled, begins_text=True)]
        trained = self._trained_turns(conversation)
        try:
            return [self._render_turns(conversation, trained)]
        except RowError as error:
            whole = self._train_on == "all" and False not in conversation.wishes.values()
            if whole and error.code in ("UNSTABLE_TEMPLATE", "LONG_DIALOGUE"):  # wherever turns begin and end
                return [self._render_turns(conversation, trained, cuts=())]
            if error.code != "UNSTABLE_TEMPLATE":
                raise
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
        alone = bool(cuts)
        traits = self._traits(conversation.tools, conversation.variables)
        others = [conversation.tools, conversation.variables]
        messages, (tools, variables), spelled = self._hide(conversation.messages, others, traits)
        if self._train_on != "all":
            messages = messages[: trained[-1] + 1]
        request = Request(tools, variables, traits.form)
        try:
            rendering = self._template.rendering(messages, request)
        except RowError as error:
            raise self._with_hint(error, messages, tools, traits, spelled) from error
        self._refuse_composed(rendering, request, traits)
        try:
            cuts = self._affordable(rendering, trained) if cuts is None else cuts
            stretches = cut(rendering, traits, trained, cuts)
        except RowError as error:
            raise self._with_hint(error, messages, tools, traits, spelled) from error
        if self._train_on == "all":  # what lies between the turns and after them too
            rest = rendering.text[sum(len(text) for text, _ in stretches) :]
            stretches = [(text, flag or at % 2 == 0) for at, (text, flag) in enumerate([*stretches, (rest, False)])]
        refuse_escaped(rendering.text, spelled)
        strict = trained if cuts else ()  # as it is rendered, where nothing is cut
        notes = self._notes_on_missing(rendering, request, traits, strict, conversation, stretches)
        return RenderedChat(stretches, spelled, alone, notes=(*rendering.notes, *notes))

    def _refuse_composed(self, rendering: Rendering, request: Request, traits: Traits) -> None:
        """Raises RowError where a template that edits texts has made a header or an end out of pieces of them."""
        row = [rendering.messages, request.tools, request.variables]
        if not self._template.edits_texts(request.tools) or not any(map(PIECE_OF_TOKEN.search, strings_in(row))):
            return
        messages, tools, variables = mapped(row, lambda text: PIECE_OF_TOKEN.sub("_", text))
        harmless = self._template.render(messages, Request(tools, variables, request.form))
        found, expected = (
            [token for token in self._tokens.pattern.findall(text) if token in traits.structural]
            for text in (rendering.text, harmless)
        )
        if found != expected:
            raise RowError("SPECIAL_TEXT", "the chat template makes control tokens out of pieces of the row's text")

    def _affordable(self, rendering: Rendering, trained: Sequence[int]) -> Sequence[int]:
        """The turns to cut at: all of them, or only those to train where each takes a rendering and there are many."""
        turns = [index for index, message in enumerate(rendering.messages) if message["role"] == "assistant"]
        for each in (turns, trained):
            if not rendering.is_costly or 2 * sum(each) <= MESSAGES_RENDERED:
                return each
        raise RowError(
            "LONG_DIALOGUE",
            f"the chat template looks ahead, so each of {len(trained)} turns takes a rendering of its own; split the "
            f"dialogue, or --train_on last (at most {MESSAGES_RENDERED:,} messages are rendered for a row)",
        )

    def _with_hint(
        self, error: RowError, messages: list[Message], tools: Tools, traits: Traits, spelled: dict[str, str]
    ) -> RowError:
        """The error in the words of the row, with a way out where there is one."""
        said = str(error)
        for stand_in, token in spelled.items():
            said = said.replace(repr(stand_in)[1:-1], token).replace(stand_in, token)
        hints = []
        if messages[0]["role"] == "system" and "system message" not in traits.writes:
            hints.append("--system_as user puts the system message before the first question")
        if error.code == "TEMPLATE" and any("function" not in tool for tool in tools or ()):
            hints.append('templates may want tools as {"type": "function", "function": {"name": …}}')
        return RowError(error.code, "; ".join([said, *hints]))

    def _notes_on_missing(
        self, rendering: Rendering, request: Request, traits: Traits, trained: Sequence[int],
        conversation: Conversation, stretches: list[tuple[str, bool]],
    ) -> list[str]:  # fmt: skip
        """What the rendering leaves out of the row; raises RowError where that would have been trained."""
        row = self._trained_turns(conversation) if trained else []
        skip = set(row) - set(trained)  # turns with samples of their own
        if list(trained) != row[-1:] and skip:  # the last sample holds all messages
            skip = set(range(len(rendering.messages))) - set(trained)
        said = "".join(text for text, supervised in stretches if supervised)
        notes = [
            f"the chat template does not read {name!r} of chat_template_kwargs"
            for name in (self._template.unread(request.variables, request.tools) if request.variables else ())
        ]
        if traits.answer and traits.answer.token not in self._tokens.numbers and not rendering.marked:
            end = traits.answer.token
            notes.append(f"no token closes an answer, the text {traits.answer.mark!r} does")
            if any(end in str(rendering.messages[turn].get("content")) for turn in trained):
                notes.append(f"an answer contains {end!r}, at which the trained model stops: another --chat_template")
        for each in missing_from(
            rendering.messages, request.tools, traits, rendering.text, {turn: said for turn in trained},
            lambda messages: self._template.render(messages, request), skip,
        ):  # fmt: skip
            strict = each.turn in trained and each.kind not in NEVER_TRAINED
            if strict and (each.is_all or self._vanished == "error"):
                way = "" if each.is_all else "--vanished warn trains the rest, "
                raise RowError(
                    "VANISHED",
                    f"the chat template writes nothing of the {each.kind} of message {each.turn}, which would be "
                    f"trained; {way}--chat_template names another template",
                )
            notes.append(f"the chat template writes nothing of the {each.kind}")
        return notes


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
