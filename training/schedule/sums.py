"""Sums over supervised tokens that come out the same however they are grouped: the arithmetic behind every logged mean.

A float sum depends on its order, so a loss logged after a resume could differ in the last digit from the uninterrupted
run. These sums are whole numbers of 2^-20 nats: exact under any grouping over micro-batches, ranks and resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FIXED_POINT = 2.0**20
COUNTS = ("supervised", "tokens", "non_finite")


class Sums:
    """Named sums of this rank since some moment; values stay on the device until somebody asks."""

    def __init__(self, values: dict[str, int] | None = None):
        self.values: dict[str, Any] = dict(values or {})

    def add(self, terms: dict[str, Tensor], supervised: int, tokens: int) -> None:
        """Add one micro-batch; where a term is not finite the whole micro-batch only counts as `non_finite`."""
        add_to([self], terms, supervised, tokens)

    def total(self, sum_ints: Callable[[Sequence[int]], list[int]]) -> dict[str, int]:
        """The sums over all ranks; `sum_ints` adds lists of whole numbers over ranks. Every rank must call it."""
        names = sorted(self.values)
        return dict(zip(names, sum_ints([int(self.values[name]) for name in names]), strict=True))


def add_to(all_sums: Iterable[Sums], terms: dict[str, Tensor], supervised: int, tokens: int) -> None:
    """`Sums.add` for several of them, with the work of one."""
    parts = {name: (term.detach().double() * FIXED_POINT).round() for name, term in terms.items()}
    finite = torch.stack(list(parts.values())).isfinite().all()
    counts: dict[str, Any] = {"supervised": supervised, "tokens": tokens, "non_finite": (~finite).long()}
    for name, part in parts.items():
        counts[name] = torch.where(finite, part, 0.0).long()
    for sums in all_sums:
        for name, count in counts.items():
            sums.values[name] = sums.values.get(name, 0) + count


def token_means(total: dict[str, int], prefix: str) -> dict[str, float]:
    """Means per supervised token under their metric names; NaN where a loss was not finite or nothing was counted."""
    count = total.get("supervised", 0)
    scale = math.nan if total.get("non_finite") or not count else 1.0 / (FIXED_POINT * count)
    names = {"ce": "loss", "correct": "token_accuracy", "max_expert_share": "max_expert_share"}
    return {f"{prefix}/{names.get(n, f'loss_{n}')}": value * scale for n, value in total.items() if n not in COUNTS}


def evaluation_means(total: dict[str, int], prefix: str) -> dict[str, float]:
    """`token_means` and the perplexity, exp of the mean cross entropy."""
    means = token_means(total, prefix)
    loss = means.get(f"{prefix}/loss", math.nan)
    return {**means, f"{prefix}/perplexity": math.exp(loss) if not loss > 700 else math.inf}
