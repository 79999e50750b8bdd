"""Preparation: a data file becomes a token store, once for all processes and all runs that would get the same one.

The store's directory is named by a hash of all that shapes it: content, tokenizer, template, options and the version of
this code. One process builds it and the others wait for the directory to appear, so nothing here needs, or can time
out, a process group.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset import store
from dataset.chat import TRAIN_ON, ChatRenderer
from dataset.control_tokens import Sample
from dataset.encode import Outcomes, Tokeniser, available_cores, in_blocks, map_in_order
from dataset.errors import DataError, Defect, RowError
from dataset.formats import LAYOUTS, Fields
from dataset.ledger import Ledger, spoken
from dataset.raw_rows import OF_THE_FILE, read_raw_rows
from dataset.reader import BAD_ROWS, OVERLONG, SYSTEM_AS, VANISHED, detect_layout
from dataset.system_prompts import SystemPrompts
from dataset.tokenizer import hash_tokenizer, template_day, vocabulary_size

VERSION = 7  # of all code that decides the tokens of a store: a change of it makes every cached store a stranger
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class DataOptions:
    """What the user may choose about reading a data file; ValueError for a choice that does not exist."""

    prompt_field: str | None = None
    response_field: str | None = None
    system_field: str | None = None
    max_seq_len: int = 1024
    overlong: str = "error"
    bad_rows: str = "error"
    data_format: str = "auto"
    train_on: str = "assistant"
    system_prompts: SystemPrompts | None = None
    text_tokens: tuple[str, ...] = ()
    vanished: str = "error"
    template_date: str | None = None  # that of the day on which the data is prepared
    system_as: str = "system"

    def __post_init__(self) -> None:
        for name, known in (
            ("overlong", OVERLONG), ("bad_rows", BAD_ROWS), ("data_format", ("auto", *LAYOUTS)), ("train_on", TRAIN_ON),
            ("vanished", VANISHED), ("system_as", SYSTEM_AS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.data_format == "fields" and self.prompt_field is None:
            raise ValueError("data_format='fields' needs prompt_field and response_field")
        if not all(token.strip() for token in self.text_tokens):
            raise ValueError(f"text_tokens={self.text_tokens} has a blank token")
        if self.template_date is not None and not _is_day(self.template_date):
            raise ValueError(f"template_date={self.template_date!r} must be a day, YYYY-MM-DD")
        if self.max_seq_len < 1:
            raise ValueError(f"max_seq_len={self.max_seq_len} must be at least 1")
        self.fields()

    def fields(self) -> Fields:
        return Fields(self.prompt_field, self.response_field, self.system_field)


def prepare(
    path: str | Path, tokenizer: PreTrainedTokenizerFast, options: DataOptions, cache_dir: str | Path,
    owner: bool = True, echo: Callable[[str], None] = print, timeout_seconds: float | None = None,
    processes: int | None = None, tokenizer_hashes: dict[str, str] | None = None,
) -> store.TokenStore:  # fmt: skip
    """Returns the token store of a data file, which the owner builds if there is none yet, on all cores or `processes`.

    Several owners at once do no harm: the first to finish publishes. A process that is no owner waits, and raises
    TimeoutError after timeout_seconds. Raises DataError with all defects when the data cannot be trained as asked.
    Who prepares many files hashes the tokenizer once: `tokenizer_hashes` is what hash_tokenizer gives.
    """
    path, options = Path(path), replace(options, template_date=template_day(tokenizer, options.template_date))
    fingerprints = {"content": _hash_file(path), **(tokenizer_hashes or hash_tokenizer(tokenizer))}
    key = json.dumps([VERSION, store.FORMAT, asdict(options), fingerprints], sort_keys=True)
    directory = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()
    if not owner:
        _wait_for(directory, timeout_seconds)
    elif store.is_intact(directory):
        echo(f"{path}: tokenised before, in {directory}")
    else:
        if directory.exists():
            echo(f"{directory}: damaged, made anew")
            shutil.rmtree(directory)
        try:
            _build(path, tokenizer, options, directory, fingerprints, echo, processes or available_cores())
        except ChildProcessError:
            raise
        except OSError as error:  # a full disk says only that it is full
            raise OSError(f"--cache_dir {cache_dir}: {error}") from error
    found = store.TokenStore(directory, source=str(path))
    if owner:
        for line in spoken(found.report):
            echo(f"{path}: {line}")
    return found


def _is_day(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError([Defect(str(path), 0, "NO_FILE", f"cannot be read: {error.strerror}")]) from error


def _wait_for(directory: Path, timeout_seconds: float | None) -> None:
    started = time.monotonic()
    while not store.is_intact(directory):
        if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
            raise TimeoutError(f"no token store appeared in {directory} within {timeout_seconds} seconds")
        time.sleep(POLL_SECONDS)


def _build(
    path: Path, tokenizer: PreTrainedTokenizerFast, options: DataOptions, directory: Path,
    fingerprints: dict[str, str], echo: Callable[[str], None], processes: int,
) -> None:  # fmt: skip
    layout = detect_layout(path, options.fields(), options.data_format)
    started, ledger, said = time.monotonic(), Ledger(), []
    echo(f"{path}: read as {LAYOUTS[layout].spoken}")
    renderer = ChatRenderer(
        tokenizer, options.train_on,
        text_tokens=options.text_tokens, vanished=options.vanished, template_date=options.template_date,
    )  # fmt: skip
    tokeniser = Tokeniser(renderer, layout, options.fields(), options.system_prompts, options.system_as)
    store.sweep(directory.parent)
    bar = tqdm(desc=path.name, unit=" rows", disable=None, leave=False)  # None: only on a terminal
    with bar, store.StoreWriter(directory, vocabulary_size(tokenizer)) as writer:
        for outcomes in map_in_order(tokeniser, in_blocks(read_raw_rows(path, said.append)), processes):
            for line, sample in _kept(outcomes, str(path), options, ledger):
                writer.add(sample.ids, sample.supervised, line, row=ledger.read)
            bar.update(len(outcomes))
        if not ledger.lengths:
            ledger.fatal = ledger.rejected
        if ledger.fatal:
            raise DataError(ledger.fatal, every=[*ledger.rejected, *ledger.dropped])
        if _hash_file(path) != fingerprints["content"]:
            raise DataError([Defect(str(path), 0, "FILE_CHANGED", "the file changed while it was being read")])
        writer.publish(
            source=str(path),
            report={**ledger.report(layout), "file_notes": said, "duplicates": writer.duplicates},
            tokenizer_fingerprint=fingerprints["tokenizer"],
            template_fingerprint=fingerprints["template"],
        )
    # Data workers are forked later; with this the thread pool of the tokenizer is not looked for, nor missed, in them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    echo(f"{path}: tokenised in {time.monotonic() - started:.1f} seconds")


def _kept(outcomes: Outcomes, path: str, options: DataOptions, ledger: Ledger) -> Iterator[tuple[int, Sample]]:
    """Yields (line, sample) for each row that is kept; the ledger learns what became of all of them."""
    for line, outcome in outcomes:
        ledger.read += 1
        fitting, errors = _fitting(outcome, options)
        defects = [Defect(path, line, error.code, str(error)) for error in errors]
        fatal = [defect for defect in defects if not _may_be_left_out(defect.code, options)]
        ledger.fatal += fatal
        if fatal or not fitting:
            ledger.rejected.append(defects[0])
            continue
        ledger.kept += 1
        ledger.dropped += defects
        ledger.turn_by_turn += any(sample.alone for sample, _ in fitting)
        ledger.spelled.update({token for sample, _ in fitting for token in sample.spelled})
        ledger.note(line, (note for sample, _ in fitting for note in sample.notes))
        for sample, length in fitting:
            ledger.count(sample, length)
            yield line, sample


def _may_be_left_out(code: str, options: DataOptions) -> bool:
    if code in OF_THE_FILE:
        return False
    return (options.overlong if code == "OVERLONG" else options.bad_rows) != "error"


def _fitting(outcome: list[Sample] | RowError, options: DataOptions) -> tuple[list[tuple[Sample, int]], list[RowError]]:
    """The samples of a row that fit, with their lengths before they were cut, and why the others do not."""
    if isinstance(outcome, RowError):
        return [], [outcome]
    fitting, errors = [], []
    for number, sample in enumerate(outcome, start=1):
        try:
            fitting.append((_fit(sample, options), len(sample.ids)))
        except RowError as error:
            place = f"sample {number} of {len(outcome)}: " if len(outcome) > 1 else ""
            errors.append(RowError(error.code, f"{place}{error}"))
    return fitting, errors


def _fit(sample: Sample, options: DataOptions) -> Sample:
    """Returns the sample, cut if it is too long for a row and may be; what is stored ends with a supervised token."""
    room = options.max_seq_len + 1  # the last stored token is only a target
    if len(sample.ids) > room and options.overlong != "truncate":
        raise RowError("OVERLONG", f"{len(sample.ids)} tokens, max_seq_len={options.max_seq_len} has room for {room}")
    targets = np.flatnonzero(sample.supervised[1:room])
    if len(targets) == 0:
        raise RowError("NO_SUPERVISED", f"none of the first {room} of {len(sample.ids)} tokens is supervised")
    length = int(targets[-1]) + 2
    return replace(sample, ids=sample.ids[:length], supervised=sample.supervised[:length])
