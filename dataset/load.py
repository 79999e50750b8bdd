"""From the data flags of a run to its packed rows: the one call that the trainer makes."""

import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerFast

from dataset.augment import SystemPrompts
from dataset.demo import write_demo
from dataset.draw import DrawnRows, EpochDraw
from dataset.ledger import report_of
from dataset.packing import plan_rows
from dataset.prepare import DataOptions, hash_tokenizer, prepare, shuffled, split
from dataset.reader import DataError
from dataset.rows import PackedRows, collate
from dataset.sources import Source, find_sources
from dataset.store import JoinedStore

DEMO = "demo"


@dataclass(frozen=True)
class DataRequest:
    """What a run is trained and validated on; the fields are flags of the trainer."""

    data_path: str
    val_data_path: str | None = None
    val_fraction: float = 0.0
    seed: int = 42
    packing: bool = True
    repack: bool = False
    files_per_epoch: int | None = None
    file_fraction: float = 1.0
    system_prompts: str | None = None
    system_prompt_ratio: float = 0.2
    cache_dir: str = ".cache/tokens"
    tokenize_workers: int | None = None
    options: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class RunData:
    """What is trained on and what is held out; `identity` changes whenever a resume would see other data."""

    train: PackedRows
    held_out: PackedRows | None
    report: dict[str, Any]
    identity: dict[str, Any]
    rejects: list[dict[str, Any]]


def load_rows(
    request: DataRequest, tokenizer: PreTrainedTokenizerFast, owner: bool, echo: Callable[[str], None],
    rejects_file: Path | None = None,
) -> RunData:  # fmt: skip
    """Tokenise once (the owner; other processes wait for its files), hold out, and pack.

    Raises DataError with the defects of all files, after they are written to `rejects_file`, one JSON object per line.
    """
    sources, val_sources = _find_files(request)
    plain = prompted = request.options
    if request.system_prompts:
        prompts = SystemPrompts.from_file(request.system_prompts, request.system_prompt_ratio, request.seed)
        prompted = replace(plain, system_prompts=prompts)
    hashes = hash_tokenizer(tokenizer)
    stores, defects, every = [], [], []
    for source, options in [*((each, prompted) for each in sources), *((each, plain) for each in val_sources)]:
        try:
            stores.append(
                prepare(
                    source.path, tokenizer, options, request.cache_dir, owner, echo,
                    processes=request.tokenize_workers, tokenizer_hashes=hashes,
                )
            )  # fmt: skip
        except DataError as error:
            defects, every = defects + error.defects, every + error.every
    if defects:
        place = write_rejects(rejects_file, [asdict(each) for each in every]) if rejects_file else None
        raise DataError(defects, place)

    store, val_store = JoinedStore(stores[: len(sources)]), JoinedStore(stores[len(sources) :])
    samples, held_out = np.arange(store.num_samples), np.arange(val_store.num_samples)
    if request.val_fraction:
        (samples, held_out), val_store = split(store.conversations, request.val_fraction, request.seed), store
    draw = EpochDraw(
        _weigh(store, samples, [source.weight for source in sources], request.seed), store.lengths,
        request.options.max_seq_len, request.packing, request.repack, request.files_per_epoch, request.file_fraction,
        request.seed,
    )  # fmt: skip
    train, val = DrawnRows(store, draw), None
    if len(held_out):
        plan = plan_rows(val_store.lengths[held_out], request.options.max_seq_len, request.packing)
        val = PackedRows(val_store, plan, held_out)
    for role, rows in (("train, first epoch" if draw.varies else "train", train), ("held out", val)):
        if rows:
            size = f"{len(rows.samples)} samples in {len(rows)} rows of {request.options.max_seq_len} tokens"
            echo(f"{role}: {size}, {rows.plan.efficiency:.1%} full")
    selection = hashlib.sha256(f"{draw.fingerprint} {train.plan.fingerprint}".encode()).hexdigest()
    return RunData(
        train,
        val,
        report={"train": report_of(train), "held_out": report_of(val) if val else None},
        identity={
            "data": f"{store.fingerprint[:16]}/{selection[:16]}",
            "template": f"{stores[0].tokenizer_fingerprint[:16]}/{stores[0].template_fingerprint[:16]}",
        },
        rejects=[{"path": each.source, **reject} for each in stores for reject in each.report["rejects"]],
    )


def _find_files(request: DataRequest) -> tuple[list[Source], list[Source]]:
    """The files to train on and those held out; ValueError for what makes no sense."""
    data_path, val_data_path = request.data_path, request.val_data_path
    if data_path == DEMO:
        train_path, held_out_path = write_demo(Path(request.cache_dir) / DEMO)
        data_path = str(train_path)
        val_data_path = val_data_path or (None if request.val_fraction else str(held_out_path))
    sources = find_sources(data_path, "--data_path")
    val_sources = find_sources(val_data_path, "--val_data_path") if val_data_path is not None else []
    if any(source.weight != 1 for source in val_sources):
        raise ValueError(f"--val_data_path {val_data_path}: every held-out sample counts once, so it takes no weights")
    if request.files_per_epoch is not None and request.files_per_epoch > len(sources):
        raise ValueError(f"--files_per_epoch {request.files_per_epoch}: --data_path names only {len(sources)}")
    return sources, val_sources


def write_rejects(path: Path, rejects: list[dict[str, Any]]) -> Path:
    """rejects.jsonl: one object {path, line, code, message} for each row that was left out; no file where none was."""
    if not rejects:
        path.unlink(missing_ok=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects), encoding="utf-8")
    return path


def make_loader(
    rows: PackedRows, batches: Sampler[list[int]], *, num_workers: int, prefetch_factor: int, persistent_workers: bool,
    pin_memory: bool,
) -> DataLoader:  # fmt: skip
    """Batches of rows; workers and pinned memory change their speed, never their content or order."""
    workers = {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers} if num_workers else {}
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        **workers,
    )


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def batches_of(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader, whose workers start here and never hear a signal, not even in their first moments."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A stop signal often goes to the whole process group; the batches of the last step are still needed then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def fetch_windows(loader: DataLoader, micro_batches: int) -> Iterator[tuple[list[dict[str, Any]], Exception | None]]:
    """The micro-batches of one step at a time, or what went wrong: all ranks hear of it before one of them raises."""
    try:
        batches = batches_of(loader)
        while window := list(itertools.islice(batches, micro_batches)):
            yield window, None
    except Exception as problem:
        yield [], problem


def _weigh(store: JoinedStore, samples: np.ndarray, weights: list[float], seed: int) -> list[np.ndarray]:
    """Sample numbers of each source with its share: weight 2.5 is every sample twice and half of them once more."""
    chosen = []
    for number, weight in enumerate(weights):
        start, end = store.starts[number : number + 2]
        part = samples[(start <= samples) & (samples < end)]
        more = round((weight % 1) * len(part))
        extra = part[shuffled(len(part), f"weights {seed}")[:more]]
        chosen.append(np.sort(np.concatenate([np.repeat(part, int(weight)), extra])))
        if len(part) and not len(chosen[-1]):
            source = store.stores[number].source
            raise ValueError(f"--data_path {source}:{weight}: with this weight none of its {len(part)} samples is left")
    return chosen
