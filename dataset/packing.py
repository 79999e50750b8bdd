"""The pack plan: which samples share a row. Pure integers, no tokens and no torch.

Best-fit-decreasing: the longest sample first, each into the fullest row that still has room. Rows are kept in buckets by
their remaining room, and one integer used as a bit set finds the tightest bucket, so a million samples take seconds.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

ALGORITHM = "best-fit-decreasing/1"  # part of the fingerprint: another plan for the same lengths needs another name


@dataclass(frozen=True)
class RowPlan:
    """Row r holds samples[offsets[r] : offsets[r + 1]]; input_positions counts what all rows hold together."""

    offsets: np.ndarray  # int64 (rows + 1,)
    samples: np.ndarray  # int64 (samples,)
    fingerprint: str
    input_positions: int
    max_seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.input_positions / (self.num_rows * self.max_seq_len)


def plan_rows(lengths: np.ndarray, max_seq_len: int) -> RowPlan:
    """Packs samples of `lengths` stored tokens into rows of at most max_seq_len input positions.

    A sample of L tokens takes L - 1 positions, because its last token is only a target. Rows are ordered by their first
    sample and samples ascend inside a row, so an unshuffled pass stays close to the order of the file.
    Raises ValueError for a sample that fits no row and for one without a target.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sizes = lengths - 1
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 1")
    if len(sizes) == 0:
        raise ValueError("there is no sample to pack")
    for wrong, reason in (
        (sizes > max_seq_len, f"longer than max_seq_len={max_seq_len} + 1"),
        (sizes < 1, "too short"),
    ):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"sample {first} has {lengths[first]} tokens, {reason} ({int(wrong.sum())} such samples)")

    rows = _best_fit_decreasing(sizes, max_seq_len)
    first_sample = np.full(int(rows.max()) + 1, len(sizes), dtype=np.int64)
    np.minimum.at(first_sample, rows, np.arange(len(sizes)))
    rank = np.empty_like(first_sample)
    rank[np.argsort(first_sample)] = np.arange(len(first_sample))
    rows = rank[rows]

    samples = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    fingerprint = hashlib.sha256(f"{ALGORITHM} {max_seq_len} {len(sizes)}".encode())
    for part in (lengths, offsets, samples):
        fingerprint.update(part.astype("<i8").tobytes())
    return RowPlan(offsets, samples, fingerprint.hexdigest(), int(sizes.sum()), max_seq_len)


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each sample, rows numbered in the order in which they were opened."""
    row_of = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by remaining room
    occupied = 0  # bit r is set while buckets[r] is not empty
    opened = 0
    assigned = []
    for size in sizes[order].tolist():
        fitting = occupied >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            bucket = buckets[room]
            row = bucket.pop()
            if not bucket:
                occupied ^= 1 << room
        else:
            room, row = capacity, opened
            opened += 1
        left = room - size
        if left:
            buckets[left].append(row)
            occupied |= 1 << left
        assigned.append(row)
    row_of[order] = assigned
    return row_of
