"""A chat template as transformers compiles it: a Jinja program in a sandbox, stopped when it takes too long.

`render` gives what `tokenizer.apply_chat_template(..., tokenize=False)` gives. That method copies its input for every
call, which took as long as the template itself, and conversations from the reader are plain JSON values already.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

from dataset.files import RowError
from dataset.reader import Message

SECONDS = 5.0  # that the templates of one conversation may take together

Tools = list[dict[str, Any]] | None


class ChatTemplate:
    """The chat template of a tokenizer, in a sandbox."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer, self._variables = tokenizer, dict(tokenizer.special_tokens_map)

    def render(self, messages: list[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """The text of the messages, and the header of an answer after it; RowError when the template fails."""
        try:
            template = _compile_jinja_template(self._tokenizer.get_chat_template(None, tools))
            return str(
                template.render(
                    messages=_alias_reasoning_fields(messages), tools=tools, documents=None,
                    add_generation_prompt=generation_prompt, **self._variables,
                )
            )  # fmt: skip
        except RowError:  # the time limit's
            raise
        except Exception as error:  # a template is a program of its own and may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RowError("TEMPLATE", f"the chat template failed: {reason}") from error

    def prefix_length(self, messages: list[Message], tools: Tools, whole: str, generation_prompt: bool = False) -> int:
        """Renders the first messages of a conversation and checks that the whole begins with the same text."""
        text = self.render(messages, tools, generation_prompt)
        if not whole.startswith(text):
            at = next((at for at, pair in enumerate(zip(text, whole, strict=False)) if pair[0] != pair[1]), len(whole))
            raise RowError(
                "UNSTABLE_TEMPLATE",
                f"the chat template renders the first {len(messages)} messages differently when more follow; the first "
                f"difference is at character {at}: {text[at : at + 40]!r} alone, {whole[at : at + 40]!r} with the rest",
            )
        return len(text)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises RowError in the block when it takes longer than SECONDS; only a process's main thread can be told.

    Python acts on a signal between two of its instructions, which a single huge one (`9 ** (9 ** 9)`) keeps waiting.
    The system itself then ends the process by SIGVTALRM, once the block has computed for two seconds more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise RowError("TEMPLATE", f"the chat template failed: it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGALRM, before)
