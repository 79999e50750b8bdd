"""From the data flags of a run to its packed rows: the one call that the trainer makes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerFast

from dataset.demo import write_demo
from dataset.packing import plan_rows
from dataset.prepare import DataOptions, prepare, split
from dataset.rows import PackedRows, collate
from dataset.store import TokenStore

DEMO = "demo"


@dataclass(frozen=True)
class RunData:
    """What is trained on and what is held out; `identity` changes whenever a resume would see other data."""

    train: PackedRows
    held_out: PackedRows | None
    report: dict[str, Any]
    identity: dict[str, Any]


def load_rows(
    data_path: str,
    val_data_path: str | None,
    val_fraction: float,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    options: DataOptions,
    cache_dir: Path,
    owner: bool,
    echo: Callable[[str], None],
) -> RunData:
    """Tokenise once (the owner; other processes wait for its files), hold out, and pack. Raises DataError."""
    if data_path == DEMO:
        train_path, held_out_path = write_demo(cache_dir / DEMO)
        data_path, val_data_path = str(train_path), val_data_path or (None if val_fraction else str(held_out_path))
    store = prepare(data_path, tokenizer, options, cache_dir, owner, echo)
    if val_fraction:
        kept, held_out = split(store.num_samples, val_fraction, seed)
        train, val = _pack(store, kept, options, echo), _pack(store, held_out, options, echo)
    else:
        val_store = prepare(val_data_path, tokenizer, options, cache_dir, owner, echo) if val_data_path else None
        train = _pack(store, None, options, echo)
        val = _pack(val_store, None, options, echo) if val_store else None
    report = {"train": _ledger(train), "held_out": _ledger(val) if val else None}
    identity = {
        "data": f"{store.fingerprint[:16]}/{train.plan.fingerprint[:16]}",
        "template": f"{store.tokenizer_fingerprint[:16]}/{store.template_fingerprint[:16]}",
    }
    return RunData(train, val, report, identity)


def make_loader(
    rows: PackedRows,
    batches: Sampler[list[int]],
    *,
    num_workers: int,
    prefetch_factor: int,
    persistent_workers: bool,
    pin_memory: bool,
) -> DataLoader:
    """Batches of rows; workers and pinned memory change their speed, never their content or order."""
    workers = {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers} if num_workers else {}
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        **workers,
    )


def _pack(
    store: TokenStore, samples: np.ndarray | None, options: DataOptions, echo: Callable[[str], None]
) -> PackedRows:
    plan = plan_rows(store.lengths if samples is None else store.lengths[samples], options.max_seq_len)
    echo(
        f"data: {store.source}: {len(plan.samples)} samples in {plan.num_rows} rows of {options.max_seq_len} tokens, "
        f"{plan.efficiency:.1%} full"
    )
    return PackedRows(store, plan, samples)


def _ledger(rows: PackedRows) -> dict[str, Any]:
    tokens = int(rows.store.lengths[rows.samples].sum())
    packing = {"samples": len(rows.samples), "tokens": tokens, "rows": len(rows), "efficiency": rows.plan.efficiency}
    return {**rows.store.report, "packing": packing}
