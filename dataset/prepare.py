"""Preparation: a data file becomes a token store, once for all processes and all runs that would get the same one.

The store's directory is named by a hash of everything that shapes it: content, tokenizer, template, options and the
version of this code. One process builds it and the others wait for the directory to appear, so nothing here needs, or
can time out, a process group.
"""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset import store
from dataset.chat import ChatRenderer, Sample
from dataset.reader import (
    Conversation,
    DataError,
    Defect,
    Fields,
    RowError,
    describe_layout,
    detect_layout,
    read_conversations,
)

VERSION = 1  # of everything that decides the tokens of a store; a change of it makes every cached store a stranger
BLOCK_ROWS = 512
POLL_SECONDS = 0.2
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class DataOptions:
    """What the user may choose about reading a data file."""

    prompt_field: str | None = None
    response_field: str | None = None
    system_field: str | None = None
    max_seq_len: int = 1024
    overlong: str = "error"
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        if self.overlong not in ("error", "drop", "truncate"):
            raise ValueError(f"overlong={self.overlong!r} must be error, drop or truncate")
        if self.bad_rows not in ("error", "skip"):
            raise ValueError(f"bad_rows={self.bad_rows!r} must be error or skip")
        if self.max_seq_len < 1:
            raise ValueError(f"max_seq_len={self.max_seq_len} must be at least 1")
        _ = self.fields

    @property
    def fields(self) -> Fields:
        return Fields(self.prompt_field, self.response_field, self.system_field)


@dataclass
class _Ledger:
    """Counts of one preparation; `report` is what the store keeps of them."""

    defects: list[Defect] = field(default_factory=list)
    fatal: list[Defect] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    spelled: Counter[str] = field(default_factory=Counter)
    read: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    cut_tokens: int = 0

    def report(self, layout: str) -> dict[str, Any]:
        kept, rejected = len(self.lengths), len(self.defects)
        assert self.read == kept + rejected, (self.read, kept, rejected)
        tokens = sum(self.lengths)
        lengths = np.array(self.lengths)
        return {
            "layout": layout,
            "rows_read": self.read,
            "rows_kept": kept,
            "rows_rejected": rejected,
            "rejected_by_code": dict(sorted(Counter(defect.code for defect in self.defects).items())),
            "rejects": [{"line": d.line, "code": d.code, "message": d.message} for d in self.defects],
            "rows_truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "tokens": tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / tokens,
            "length_quantiles": {name: int(np.quantile(lengths, q, method="nearest")) for name, q in QUANTILES.items()},
            "spelled_control_tokens": dict(sorted(self.spelled.items())),
        }


def prepare(
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    options: DataOptions,
    cache_dir: str | Path,
    owner: bool = True,
    echo: Callable[[str], None] = print,
    timeout_seconds: float | None = None,
) -> store.TokenStore:
    """Returns the token store of a data file, building it if this process is the owner and there is none yet.

    Several owners do no harm: the first to finish publishes. A process that is no owner waits, and raises TimeoutError
    after timeout_seconds. Raises DataError with every defect when the data cannot be trained as the options ask.
    """
    path = Path(path)
    content, key = _keys(path, tokenizer, options)
    directory = Path(cache_dir) / key
    if not owner:
        _wait_for(directory, timeout_seconds)
    elif store.is_published(directory):
        echo(f"data: {path} is tokenised already ({directory})")
    else:
        _build(path, content, tokenizer, options, directory, echo)
    return store.TokenStore(directory, source=str(path))


def split(num_samples: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ascending sample numbers for training and for validation, at least one of each.

    Each sample's place comes from a hash of its number and the seed, so it does not depend on a library's generator.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction={fraction} must lie between 0 and 1")
    if num_samples < 2:
        raise ValueError(f"{num_samples} sample cannot be split into training and validation")
    held_out = min(max(round(num_samples * fraction), 1), num_samples - 1)
    order = np.argsort(_mix(np.arange(num_samples, dtype=np.uint64), seed), kind="stable")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _mix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) over number and seed, uint64 in and out."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(path: Path, tokenizer: PreTrainedTokenizerFast, options: DataOptions) -> tuple[str, str]:
    """Returns the hash of the file's content and the name of the store that belongs to it."""
    content = _hash_file(path)
    shaped_by = {
        "version": [VERSION, store.FORMAT],
        "content": content,
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None},
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": asdict(options),
    }
    return content, hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError([Defect(str(path), 0, "NO_FILE", f"cannot be read: {error.strerror}")]) from error


def _wait_for(directory: Path, timeout_seconds: float | None) -> None:
    started = time.monotonic()
    while not store.is_published(directory):
        if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
            raise TimeoutError(f"no token store appeared at {directory} within {timeout_seconds} s")
        time.sleep(POLL_SECONDS)


def _build(
    path: Path,
    content: str,
    tokenizer: PreTrainedTokenizerFast,
    options: DataOptions,
    directory: Path,
    echo: Callable[[str], None],
) -> None:
    layout = detect_layout(path, options.fields)
    echo(f"data: {path} read as {describe_layout(layout, options.fields)}")
    started = time.monotonic()
    ledger = _Ledger()
    with store.StoreWriter(directory, len(tokenizer)) as writer:
        for line, (ids, supervised) in _samples(path, layout, ChatRenderer(tokenizer), options, ledger):
            writer.add(ids, supervised, line)
        if ledger.read and not ledger.lengths:
            ledger.fatal = ledger.fatal or ledger.defects
        if ledger.fatal:
            raise DataError(ledger.fatal)
        if _hash_file(path) != content:
            raise DataError([Defect(str(path), 0, "FILE_CHANGED", "the file was changed while it was being read")])
        report = ledger.report(layout)
        writer.publish(str(path), report)
    echo(
        f"data: {report['rows_kept']} of {report['rows_read']} rows, {report['tokens']} tokens, "
        f"{report['supervised_share']:.1%} supervised, {time.monotonic() - started:.1f} s"
    )
    for code, count in report["rejected_by_code"].items():
        echo(f"data: {count} rows left out: {code}")
    for token, count in report["spelled_control_tokens"].items():
        echo(f"data: the text of {count} rows spells {token}, which stays text")


def _samples(
    path: Path, layout: str, renderer: ChatRenderer, options: DataOptions, ledger: _Ledger
) -> Iterator[tuple[int, Sample]]:
    """Yields (line, sample) for each row that is trained; the ledger learns what became of the others."""
    rows = read_conversations(path, options.fields, layout)
    while block := list(itertools.islice(rows, BLOCK_ROWS)):
        rendered = iter(renderer.render_batch([row for row in block if isinstance(row, Conversation)]))
        for row in block:
            ledger.read += 1
            try:
                if isinstance(row, Defect):
                    raise RowError(row.code, row.message)
                result = next(rendered)
                if isinstance(result, RowError):
                    raise result
                sample, spelled = result
                sample = _fit(sample, options, ledger)
            except RowError as error:
                defect = Defect(str(path), row.line, error.code, str(error))
                ledger.defects.append(defect)
                policy = options.overlong if error.code == "OVERLONG" else options.bad_rows
                if policy == "error":
                    ledger.fatal.append(defect)
                continue
            ledger.spelled.update(spelled)
            ledger.lengths.append(len(sample[0]))
            ledger.supervised_tokens += int(sample[1].sum())
            yield row.line, sample


def _fit(sample: Sample, options: DataOptions, ledger: _Ledger) -> Sample:
    """Cuts a sample that is too long for a row, or raises RowError; it always ends with a supervised token."""
    ids, supervised = sample
    room = options.max_seq_len + 1  # the last stored token is only a target
    if len(ids) > room and options.overlong != "truncate":
        raise RowError("OVERLONG", f"{len(ids) - 1} positions do not fit max_seq_len={options.max_seq_len}")
    targets = np.flatnonzero(supervised[1:room])
    if len(targets) == 0:
        raise RowError("NO_SUPERVISED", f"no supervised token among the first {room}")
    length = int(targets[-1]) + 2
    if length < len(ids):
        ledger.truncated += 1
        ledger.cut_tokens += len(ids) - length
    return ids[:length], supervised[:length]
