"""Where a turn begins and ends, by what transformers renders with it as the last one, with more, and as a prompt."""

from __future__ import annotations

import re

from scripts.templates.oracle import Oracle, Reference
from scripts.templates.words import Messages, common

BEGINS = re.compile(r"(?i)<[|｜]?(im_|hy_)?(start|begin|user|assistant|system|role)(?!.*end)")


class Turns:
    """The turns of one conversation, rendered as a reference is."""

    def __init__(self, oracle: Oracle, messages: Messages, reference: Reference):
        self.oracle, self.messages = oracle, messages
        self.way, self.tools = reference.way, reference.tools

    def render(self, messages: Messages, prompt: bool = False) -> str | None:
        """The text of `apply_chat_template`; None where the template refuses."""
        try:
            return self.oracle.render(messages, self.tools, self.way, prompt)
        except Exception:  # a template is a program of its own
            return None

    def places(self, text: str, messages: Messages, number: int, prompt: bool = False) -> list[int]:
        return self.oracle.places(text, messages, self.tools, self.way, number, prompt)

    def prompt_tail(self, turn: int) -> bytes:
        """What the generation prompt holds after the text of the messages before a turn."""
        said = self.messages[:turn]
        text = self.render(said, prompt=True)
        if text is None:
            return b""
        places = [self.places(text, said, number, prompt=True) for number in range(len(said))]
        return text.encode()[max((p[-1] + 1 for p in places if p), default=0) :]

    def end(self, turn: int, is_last: bool) -> bytes:
        """What has to be trained after a turn's text, from how the turn ends as the last one and in the middle.

        What both have in common up to its last mark; if that has none, up to the first mark of the middle.
        """
        alone, middle = self.after(turn)
        plain, calls = self._plain_end(), self.messages[turn].get("tool_calls")
        if middle is None:
            return alone[: max(self.marks(alone), default=len(alone.rstrip()))]
        shared = alone[: common(alone, middle)]
        marks = self.marks(shared)
        if plain is not None and calls and not (marks and plain in shared):  # plain answers are left open
            found = middle.find(plain)
            after = next((at for at in self.marks(middle) if at > len(shared)), len(shared))
            closed = middle[: found + len(plain) if found >= 0 else after]
            return _closed_as(alone, closed) if is_last else closed
        if marks:
            begins = self._begin_of_next(shared)
            return shared[: max((at for at in marks if at <= begins), default=marks[0])]
        if is_last and (own := self.marks(alone)):
            return alone[: own[-1]]  # another token at the end of all
        if found := self.marks(middle):
            return middle[: found[0]]
        return shared or middle[: 1 + len(middle) - len(middle.lstrip())]

    def unclosed(self, turn: int) -> bytes:
        """What follows the text of a turn amid others, up to the mark that ends it; nothing where text ends it."""
        shown = self.end(turn, False).decode(errors="replace")
        marks = list(self.oracle.mark.finditer(shown))
        return shown[: marks[-1].start()].rstrip().encode() if marks else b""

    def after(self, turn: int) -> tuple[bytes, bytes | None]:
        """What follows the text of a turn as the last one, and with a message of the next role after it."""
        said = self.messages[: turn + 1]
        calls = self.messages[turn].get("tool_calls", [])
        results: Messages = [
            {"role": "tool", "content": "walnuts", "tool_call_id": call.get("id", "")} for call in calls
        ]
        more: Messages = [
            *(results or [{"role": "user", "content": "walnuts"}]),
            {"role": "assistant", "content": "hazel"},
        ]
        return self._behind(said, turn) or b"", self._behind(said + more, turn)

    def _behind(self, messages: Messages, turn: int) -> bytes | None:
        text = self.render(messages)
        if text is None:
            return None
        places = [self.places(text, messages, number) for number in range(turn, len(messages))]
        later = min((p[0] for p in places[1:] if p), default=len(text.encode()))
        own = [place for place in places[0] if place < later]
        return text.encode()[own[-1] + 1 : later] if own else None

    def _plain_end(self) -> bytes | None:
        """What ends a plain answer in the middle, if the template leaves the last one open."""
        said: Messages = [{"role": "user", "content": "Anise"}, {"role": "assistant", "content": "Basil"}]
        more: Messages = [{"role": "user", "content": "Clove"}, {"role": "assistant", "content": "Dill"}]
        alone, middle = self.render(said), self.render(said + more)
        if alone is None or middle is None or "Basil" not in alone or "Basil" not in middle:
            return None
        if self.marks(alone.rsplit("Basil", 1)[1].encode()):
            return None
        after = middle.rsplit("Basil", 1)[1].split("Clove")[0].encode()
        marks = self.marks(after)
        return after[: marks[0]].strip() if marks else None

    def marks(self, text: bytes) -> list[int]:
        """The ends of the tokens in a text that may end a turn."""
        shown = text.decode(errors="replace")
        return [len(shown[: match.end()].encode()) for match in self.oracle.mark.finditer(shown)]

    def whole_marks(self, text: bytes, end: int) -> int:
        """The place, or the beginning of the token that it would cut."""
        shown = text.decode(errors="replace")
        cut = len(text[:end].decode(errors="ignore"))
        inside = [m.start() for m in self.oracle.mark.finditer(shown) if m.start() < cut < m.end()]
        return len(shown[: inside[0]].encode()) if inside else end

    def shared(self, gap: bytes, prompt: bytes) -> int:
        """Length of what stands before an answer and in the prompt for it, without the half of a token."""
        end = common(gap, prompt)
        return min(self.whole_marks(gap, end), self.whole_marks(prompt, end))

    def _begin_of_next(self, text: bytes) -> int:
        """Where the header of a next turn begins, which some templates write though nobody asked for it."""
        shown = text.decode(errors="replace")
        found = [m.start() for m in self.oracle.mark.finditer(shown) if BEGINS.match(m[0])]
        return len(shown[: found[0]].encode()) if found and found[0] else len(text)


def _closed_as(alone: bytes, closed: bytes) -> bytes:
    """The end of a turn that is left open, and then what closes it elsewhere."""
    alone = alone.rstrip()
    known = next((alone[at:] for at in range(len(alone)) if alone[at:] in closed), b"")
    return alone + closed[closed.rindex(known) + len(known) :]
