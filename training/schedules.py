"""Pure functions of the global step: what the learning rate is at step s of T, with no memory."""

from __future__ import annotations

import math


def warmup_steps_of(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """Steps of warmup, given as a number or as a share of the run (rounded up); never longer than the run."""
    return min(warmup_steps or math.ceil(warmup_ratio * total_steps), total_steps)


def lr_factor(step: int, total_steps: int, *, schedule: str, warmup_steps: int = 0, min_lr_ratio: float = 0.1) -> float:
    """Share of the peak learning rate at `step` (1 ... total_steps).

    Warmup rises as step / warmup_steps. Then progress p runs from 0 at the end of warmup to 1 at the last step, and
    cosine is floor + (1 - floor) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, eq. 5), linear is 1 - (1 - floor) p.
    """
    assert 1 <= step <= total_steps, (step, total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - (1.0 - min_lr_ratio) * progress
    assert schedule == "cosine", schedule
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
