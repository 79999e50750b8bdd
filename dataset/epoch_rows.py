"""What an epoch trains, where epochs differ: files and shares of them drawn afresh, samples laid into rows afresh.

Every draw is a pure function of (seed, epoch), so a resumed run sees what the uninterrupted one would have seen.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from dataset.packing import RowPlan, plan_rows
from dataset.rows import Document, PackedRows
from dataset.shuffle import shuffled
from dataset.store import JoinedStore


class EpochDraw:
    """Maps an epoch to its samples and their pack plan."""

    def __init__(
        self, parts: Sequence[np.ndarray], lengths: np.ndarray, max_seq_len: int, packing: bool = True,
        repack: bool = False, files_per_epoch: int | None = None, file_fraction: float = 1.0, seed: int = 0,
    ):  # fmt: skip
        """`parts` holds the sample numbers of each file, `lengths` the stored tokens of all samples."""
        self._parts = [part for part in parts if len(part)]
        self._lengths, self._max_seq_len, self._packing = lengths, max_seq_len, packing
        self._repack, self._files, self._fraction, self._seed = repack, files_per_epoch, file_fraction, seed
        self._draws = file_fraction < 1 or (files_per_epoch or len(self._parts)) < len(self._parts)
        self.varies = repack or self._draws
        self._num_rows: dict[int, int] = {}

    @property
    def fingerprint(self) -> str:
        """Of all that decides which samples an epoch has."""
        options = (self._repack, self._files, self._fraction) if self.varies else ()
        digest = hashlib.sha256(repr(options).encode())
        for part in self._parts:
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def num_rows(self, epoch: int) -> int:
        key = epoch if self._draws else 0  # laying the same samples anew changes no length of a row
        if key not in self._num_rows:
            self(key)
        return self._num_rows[key]

    def __call__(self, epoch: int) -> tuple[RowPlan, np.ndarray]:
        """The pack plan of an epoch and the sample numbers (N,) that it speaks of."""
        samples = self._samples(epoch)
        if self._repack:  # samples of the same length change places
            samples = samples[shuffled(len(samples), f"repack {self._seed} {epoch}")]
        plan = plan_rows(self._lengths[samples], self._max_seq_len, self._packing)
        self._num_rows[epoch if self._draws else 0] = plan.num_rows
        return plan, samples

    def _samples(self, epoch: int) -> np.ndarray:
        if not self._draws:
            return np.concatenate(self._parts)
        files = np.sort(shuffled(len(self._parts), f"files {self._seed} {epoch}")[: self._files])
        drawn = []
        for file in files.tolist():
            part = self._parts[file]
            count = max(1, round(len(part) * self._fraction))
            drawn.append(np.sort(part[shuffled(len(part), f"file {file} {self._seed} {epoch}")[:count]]))
        return np.concatenate(drawn)


class StagedDraw:
    """The draws of stages that follow one another, each for its epochs; the last one goes on for ever."""

    def __init__(self, draws: Sequence[EpochDraw], epochs: Sequence[int]):
        self._draws = draws
        self.starts = [sum(epochs[:number]) for number in range(len(draws))]  # first epoch of each stage
        self.varies = len(draws) > 1 or draws[0].varies

    @property
    def fingerprint(self) -> str:
        """Of all that decides which samples an epoch has."""
        each = [f"{start} {draw.fingerprint}" for start, draw in zip(self.starts, self._draws, strict=True)]
        return hashlib.sha256(" ".join(each).encode()).hexdigest()

    def num_rows(self, epoch: int) -> int:
        return self._of(epoch).num_rows(epoch)

    def __call__(self, epoch: int) -> tuple[RowPlan, np.ndarray]:
        return self._of(epoch)(epoch)

    def _of(self, epoch: int) -> EpochDraw:
        return self._draws[bisect_right(self.starts, epoch) - 1]


class DrawnRows(PackedRows):
    """The packed rows of the epoch that is set; worker processes that live longer than an epoch follow."""

    def __init__(self, store: JoinedStore, draw: EpochDraw | StagedDraw):
        self._draw, self._drawn = draw, 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        super().__init__(store, *draw(0))

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self._follow()

    def rows_of(self, epoch: int) -> int:
        """Rows of any epoch."""
        return self._draw.num_rows(epoch)

    def __getitem__(self, row: int) -> list[Document]:
        self._follow()
        return super().__getitem__(row)

    def _follow(self) -> None:
        epoch = int(self._epoch)
        if epoch != self._drawn and self._draw.varies:
            super().__init__(self.store, *self._draw(epoch))
        self._drawn = epoch
