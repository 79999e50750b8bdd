"""What remembers the observations of a metric: when it last improved, and whether the run should stop for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Memory:
    """The fields that no caller gives are its state."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future besides the flags, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another class or version."""
        if differing := sorted(state.keys() ^ self.state_dict().keys()):
            raise ValueError(
                f"the saved state of {type(self).__name__} is that of another kind or version, differing in {differing}"
            )
        for name, value in state.items():
            setattr(self, name, value)


def improves(value: float, best: float | None, by: float, mode: str) -> bool:
    """Whether a finite value is better than `best` by more than `by`; NaN and infinities never are."""
    assert mode in ("min", "max"), mode
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return value < best - by if mode == "min" else value > best + by


@dataclass
class EarlyStopping(Memory):
    """Stops at the `patience`-th observation in a row without an improvement of more than `min_delta`.

    The first finite observation is an improvement, so no run stops before observation patience + 1 while its metric is
    finite. `best` is what the last improvement reached: steps smaller than `min_delta` add up to one.
    """

    patience: int
    min_delta: float
    mode: str
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)  # observations since the best

    def observe(self, value: float) -> bool:
        """True from the observation at which the run should stop until one that improves."""
        if improves(value, self.best, self.min_delta, self.mode):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience
