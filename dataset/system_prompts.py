"""System messages of conversations: given to those that have none, and moved for templates that know none."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.reader import Conversation


@dataclass(frozen=True)
class SystemPrompts:
    """Gives a share of the conversations without system message and tools one of the texts.

    A hash of the conversation and the seed decides, so that rows that say the same still do so afterwards.
    """

    texts: tuple[str, ...]
    ratio: float
    seed: int

    @classmethod
    def from_file(cls, path: str, ratio: float, seed: int) -> "SystemPrompts":
        """Reads one prompt per line; raises ValueError for a file that holds none."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--system_prompts {path}: cannot be read: {error}") from None
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise ValueError(f"--system_prompts {path}: the file has no line with a prompt")
        return cls(texts, ratio, seed)

    def add_to(self, conversation: Conversation) -> Conversation:
        """The conversation, perhaps with a system message in front; its other messages move on by one."""
        messages = conversation.messages
        if not messages or messages[0]["role"] == "system" or conversation.tools:
            return conversation
        said = json.dumps(messages, sort_keys=True)
        digest = hashlib.sha256(f"system prompt {self.seed} {said}".encode()).digest()
        if int.from_bytes(digest[:8], "big") >= self.ratio * 2**64:
            return conversation
        text = self.texts[int.from_bytes(digest[8:16], "big") % len(self.texts)]
        return replace(
            conversation,
            messages=[{"role": "system", "content": text}, *messages],
            wishes={index + 1: wish for index, wish in conversation.wishes.items()},
        )


def system_as_user(conversation: Conversation) -> Conversation:
    """The conversation with its system message before the text of its first question, after a blank line."""
    messages = conversation.messages
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or messages[0]["role"] != "system":
        return conversation
    system, question = messages[0]["content"], messages[first]
    said = f"{system}\n\n{question['content']}" if system.strip() else question["content"]
    return replace(
        conversation,
        messages=[*messages[1:first], {**question, "content": said}, *messages[first + 1 :]],
        wishes={index - 1: wish for index, wish in conversation.wishes.items() if index},
    )
