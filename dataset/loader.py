"""Batches out of rows: the loader, its workers, and the micro-batches of a step."""

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dataset.rows import PackedRows, collate


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
