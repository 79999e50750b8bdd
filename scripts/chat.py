"""Talks with an exported model, in a terminal or through --prompt and pipes: `python -m scripts.chat runs/full_sft`.

Only the model's words go to standard output, everything else to standard error. Each turn renders the whole history
through the chat template, so that the model reads what training would have shown it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.reader import SYSTEM_AS
from scripts.evaluate import chat_tokenizer, day_of_run, positive
from training.control.exit_codes import exit_code_of

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character while its last ones are missing


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.chat", description=__doc__.split(":")[0] + ".")
    flag = parser.add_argument
    flag("directory", metavar="DIR", type=Path, help="exported model (runs/x/final) or run (runs/x)")
    flag("--prompt", metavar="TEXT", action="append", help="answer this and leave; again for the next turn of the talk")
    flag("--system", metavar="TEXT", help="system message that the conversation begins with")
    flag("--system_as", choices=SYSTEM_AS, default=SYSTEM_AS[0], help="where it stands: user = before the first prompt")
    flag("--chat_template", metavar="FILE", help="chat template instead of that in DIR: a Jinja file, or one of ours")
    flag("--temperature", metavar="X", type=float, default=0.0, help="0 = always the likeliest token (default)")
    flag(
        "--top_p",
        metavar="X",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this mass, 1 = from all",
    )
    flag("--top_k", metavar="N", type=int, default=0, help="draw from the N likeliest tokens, 0 = from all (default)")
    flag("--max_new_tokens", metavar="N", type=positive, default=512, help="longest answer in tokens (default 512)")
    flag("--seed", metavar="N", type=int, default=42, help="seed of the draws at a temperature above 0 (default 42)")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA where there is one (default)")
    flag("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    return parser.parse_args(argv)


def hint(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class TextStream:
    """Turns token ids into text as they come and keeps back what ends inside a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the ids shown last: some decoders treat the first token of a text differently
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Returns the text that is complete with this token, often one word and sometimes none."""
        self._pending.append(token)
        return "" if self._decode(self._before + self._pending).endswith(UNFINISHED) else self.rest()

    def rest(self) -> str:
        """Returns all that is kept back, be it a whole character or not."""
        text = self._decode(self._before + self._pending)[len(self._decode(self._before)) :]
        self._before, self._pending = self._pending or self._before, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def as_message(answer: str) -> dict[str, str]:
    """The message that an answer becomes, with the reasoning apart as training rows have it."""
    reasoning, closed, content = answer.removeprefix("<think>").partition("</think>")
    if answer.startswith("<think>") and closed:
        return {"role": "assistant", "reasoning_content": reasoning.strip("\n"), "content": content.lstrip("\n")}
    return {"role": "assistant", "content": answer}


@dataclass
class Talk:
    """A model and the messages that it remembers; /reset goes back to `first`."""

    model: Any
    tokenizer: Any
    renderer: Any
    sampling: Any
    max_new_tokens: int
    first: list[dict[str, str]]
    messages: list[dict[str, str]]
    system_as: str = "system"

    def answer(self, text: str, interruptible: bool) -> None:
        """Write the answer as it comes and remember it. Raises ValueError where the context has no room for one."""
        from dataset.reader import Conversation
        from dataset.system_prompts import system_as_user
        from model.build import known_positions
        from model.generate import generate_stream

        asked = [*self.messages, {"role": "user", "content": text}]
        shown = system_as_user(Conversation(0, asked)).messages if self.system_as == "user" else asked
        prompt = self.renderer.prompt_ids(shown)
        context = known_positions(self.model)
        room = context + 1 - len(prompt)  # the last new token is never read, so it takes no position
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens, the context of this model only {context}")
        longest = min(self.max_new_tokens, room)
        ends, texts = self.renderer.end_ids, self.renderer.end_texts
        sampling = replace(self.sampling, seed=self.sampling.seed + len(asked))  # each turn draws anew
        tokens = generate_stream(self.model, prompt, max_new_tokens=longest, eos_token_ids=ends, sampling=sampling)
        stream, answer, count = TextStream(self.tokenizer), "", 0
        try:
            with contextlib.closing(tokens):
                for token in tokens:
                    count += 1
                    piece = stream.add(token)
                    answer += piece
                    print(piece, end="", flush=True)
                    if any(text in answer for text in texts):  # a template that closes turns by text
                        break
        except KeyboardInterrupt:
            if not interruptible:
                raise
        rest = stream.rest().rstrip(UNFINISHED)  # half a character is of no use to anybody
        print(rest, flush=True)
        if count == longest:
            limit = f"the context of this model, {context} tokens, is full" if longest == room else "--max_new_tokens"
            hint(f"[cut after {count} tokens: {limit}]")
        for text in texts:
            answer = answer.partition(text)[0]
        if (answer + rest).strip():  # a turn without an answer is nothing that training has shown
            self.messages = [*asked, as_message(answer + rest)]


def load(options: argparse.Namespace) -> Talk:
    """Raises ValueError that says what is wrong with a flag or with the directory."""
    from dataset.chat import ChatRenderer
    from dataset.tokenizer import template_day
    from model.build import exported_directory
    from model.generate import Sampling
    from model.loading import load_model
    from model.trust import Trust
    from training.device import choose_device

    for text in filter(None, [options.system, *(options.prompt or [])]):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{text!r} is not UTF-8")
    directory = exported_directory(options.directory)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    device = choose_device(options.device)
    trust = Trust(code=options.trust_remote_code)
    model = load_model(directory, trust=trust).to(device)
    tokenizer = chat_tokenizer(directory, options.chat_template, trust)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hint(f"{directory}: {parameters:,} parameters on {device}" + ("" if options.prompt else f"; {COMMANDS}"))
    first = [{"role": "system", "content": options.system}] if options.system else []
    renderer = ChatRenderer(tokenizer, template_date=template_day(tokenizer, day_of_run(directory)))
    return Talk(model, tokenizer, renderer, sampling, options.max_new_tokens, first, first, options.system_as)


def read_line() -> str | None:
    """The next line of standard input, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        print(end="\n" * sys.stdin.isatty(), file=sys.stderr)  # Ctrl-D leaves the cursor behind the prompt
        return None


def converse(talk: Talk, read: Callable[[], str | None], interactive: bool) -> None:
    """Answer what is read until it ends. Raises ValueError for what cannot be answered, unless a person can be told."""
    while True:
        try:
            line = read()
            command = (line or "").strip()
            if line is None or command == "/exit":
                return
            if command == "/reset":
                talk.messages = talk.first
            elif re.fullmatch("/[a-z]+", command):
                hint(COMMANDS)
            elif command:
                talk.answer(line, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            hint(f"\n{COMMANDS}")
        except ValueError as error:
            if not interactive:
                raise
            hint(f"[{error}; /reset begins a new conversation]")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    if "" in (options.prompt or []):
        hint("error: --prompt '': there is nothing to answer")
        return 2
    try:
        talk = load(options)
        if options.prompt:
            converse(talk, iter([*options.prompt, None]).__next__, interactive=False)
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            if sys.stdin.isatty():
                import readline  # noqa: F401 - its presence gives input() line editing
            converse(talk, read_line, interactive=sys.stdin.isatty())
    except (ValueError, OSError) as error:
        hint(f"error: {error}")
        return exit_code_of(error)
    except KeyboardInterrupt:
        return 130  # what a shell expects of an interrupted program
    return 0


if __name__ == "__main__":
    sys.exit(main())
