"""Orders that a hash decides: the same on every machine, whatever its random numbers are."""

import hashlib

import numpy as np


def split(conversations: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ascending sample numbers for training and for validation, at least one of each.

    Samples with the same number in `conversations` (samples,) stay together, so that what is held out is not trained
    under another line. A hash of that number and the seed decides the side; it knows neither line nor file.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction={fraction} must lie between 0 and 1")
    distinct, group_of, sizes = np.unique(conversations.astype(np.uint64), return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        raise ValueError(f"val_fraction={fraction} cannot split {len(distinct)} conversation")
    order = np.argsort(_mix(distinct + _start(f"split {seed}")), kind="stable")
    wanted, chosen = max(1, round(len(conversations) * fraction)), []
    for group in order.tolist():
        if wanted <= 0:
            break
        if sizes[group] <= wanted:  # a conversation that stands there more often is trained
            wanted -= sizes[group]
            chosen.append(group)
    chosen = (chosen or [int(np.argmin(sizes))])[: len(distinct) - 1]
    held_out = np.isin(group_of, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def shuffled(count: int, key: str) -> np.ndarray:
    """The numbers below `count` in an order that the key alone decides."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + _start(key)), kind="stable")


def _start(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Scatters uint64 numbers as splitmix64 does (Steele, Lea and Flood, 2014)."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
