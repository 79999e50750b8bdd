"""The pack plan: which samples share a row. Pure integers, no tokens and no torch.

Rows are filled one after another, the longest sample left first, then always the longest that fits, until one or two
samples fill the rest to the last position. Plain best-fit-decreasing leaves 1.5 % of the positions empty when lengths
lie close together (GSM8K in rows of 1,024 tokens), closing rows exactly leaves 0.6 % in the same time. Integers used as
bit sets over lengths find the samples that fit, so a million of them take seconds.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

ALGORITHM = "longest-first, exact close/1"  # part of the fingerprint: change it with whatever changes a plan


@dataclass(frozen=True)
class RowPlan:
    """Row r holds samples[offsets[r] : offsets[r + 1]], which together have row_lengths[r] input positions."""

    offsets: np.ndarray  # int64 (rows + 1,)
    samples: np.ndarray  # int64 (samples,)
    fingerprint: str
    row_lengths: np.ndarray  # int64 (rows,)
    max_seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_lengths)

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that hold a token."""
        return int(self.row_lengths.sum()) / (self.num_rows * self.max_seq_len)


def plan_rows(lengths: np.ndarray, max_seq_len: int, packing: bool = True) -> RowPlan:
    """Packs samples of `lengths` stored tokens into rows of at most max_seq_len input positions, or each into its own.

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
    for wrong, reason in ((sizes > max_seq_len, f"more than max_seq_len={max_seq_len} + 1"), (sizes < 1, "too few")):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"sample {first} has {lengths[first]} tokens, {reason} ({int(wrong.sum())} such samples)")

    row_of = np.arange(len(sizes))
    if packing:
        picked, rows = _fill_rows(sizes, max_seq_len)
        longest_first = np.argsort(-sizes, kind="stable")  # equal sizes in sample order
        row_of[longest_first] = rows[np.argsort(-picked, kind="stable")]

    _, first_samples = np.unique(row_of, return_index=True)
    row_of = np.argsort(np.argsort(first_samples))[row_of]
    samples = np.argsort(row_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    fingerprint = hashlib.sha256(f"{ALGORITHM} {max_seq_len} {len(sizes)}".encode())
    for part in (lengths, offsets, samples):
        fingerprint.update(part.astype("<i8").tobytes())
    row_lengths = np.add.reduceat(sizes[samples], offsets[:-1])
    return RowPlan(offsets, samples, fingerprint.hexdigest(), row_lengths, max_seq_len)


def _fill_rows(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sizes in the order in which they are picked and the row of each, both (samples,)."""
    counts = np.bincount(sizes, minlength=capacity + 1).tolist()
    left = sum(1 << size for size in range(1, capacity + 1) if counts[size])  # bit s: a sample of size s is left
    mirror = sum(1 << (capacity - size) for size in range(1, capacity + 1) if counts[size])  # the same, read backwards
    picked: list[int] = []
    rows: list[int] = []
    row = -1
    room = 0

    while left:
        fitting = left & ((2 << room) - 1)
        if not fitting:
            row, room, fitting = row + 1, capacity, left
        chosen = [fitting.bit_length() - 1]
        if room < capacity and chosen[0] < room:  # a row's first sample is the longest, whatever would close it
            pairs = left & (mirror >> (capacity - room))  # bit s: size s and size room - s are both left
            if room % 2 == 0 and counts[room // 2] == 1:
                pairs &= ~(1 << room // 2)
            if pairs:
                larger = pairs.bit_length() - 1
                chosen = [larger, room - larger]
        for size in chosen:
            picked.append(size)
            rows.append(row)
            room -= size
            counts[size] -= 1
            if not counts[size]:
                left ^= 1 << size
                mirror ^= 1 << (capacity - size)
    return np.array(picked), np.array(rows)
