"""What is asked of a tokenizer before it reads a text: its hashes, its size, the day that its template writes."""

import hashlib
import json
import os
import time
from datetime import date
from typing import Any

import psutil
from transformers import PreTrainedTokenizerFast


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Hashes of all of a tokenizer that decides tokens; a large vocabulary takes a second."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "tokenizer": _hash_json([backend, special]),
        "template": _hash_json(tokenizer.chat_template),
    }


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs for a tokenizer: more than it has entries, where its ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def template_day(tokenizer: PreTrainedTokenizerFast, named: str | None = None) -> str | None:
    """The day that the chat template writes, as named or as it is today; None for a template that writes none."""
    if "strftime_now" not in str(tokenizer.chat_template):  # in any of them, where there are several
        return None
    return named or date.fromtimestamp(launched_at()).isoformat()


def launched_at() -> float:
    """Unix time; under torchrun that of its start, so that at midnight too its processes name the same day.

    Otherwise one of them could build a store while another waits for that of the day before.
    """
    return psutil.Process(os.getppid()).create_time() if "TORCHELASTIC_RUN_ID" in os.environ else time.time()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
