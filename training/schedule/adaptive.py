"""Multipliers of the learning rate that remember: they follow a metric, observation by observation.

The learning rate is schedule(step) x factor. A decision takes nothing but the observations, the scheduled rates and the
flags, so all ranks that observe the same values decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from training.config import Config
from training.schedule.stopping import Memory, improves


@dataclass(frozen=True)
class Change:
    """One change of the multiplier, for the log."""

    before: float
    after: float
    reason: str


@dataclass(kw_only=True)
class Plateau(Memory):
    """x `lr_adapt_factor` at the `lr_adapt_patience`-th observation in a row without improvement.

    An improvement is a change from the best by more than `lr_adapt_threshold`; a value that is not finite is none.
    `best` is what the last improvement reached, so that smaller ones add up. A cut starts the count again, and the next
    `cooldown` observations count but change nothing; what falls due in them waits for the first one after. Nor does an
    observation that improves ever change the factor.

    A cut goes no lower than `min_lr` / scheduled rate, and nowhere if the rate is there already: then it passes unsaid,
    and the count starts again all the same.

    Without a cooldown this is torch's ReduceLROnPlateau of threshold mode "abs" and patience - 1, because that one cuts
    when the count exceeds its patience.
    """

    monitor_mode: str
    lr_adapt_patience: int
    lr_adapt_factor: float
    lr_adapt_threshold: float
    lr_adapt_cooldown: int | None
    min_lr: float
    factor: float = field(default=1.0, init=False)
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)  # observations since the best or what else starts the count again
    quiet: int = field(default=0, init=False)  # observations to come in which nothing changes

    @property
    def cooldown(self) -> int:
        return self.lr_adapt_cooldown or 0

    def observe(self, value: float, scheduled_lr: float) -> Change | None:
        """Takes the next value of the metric; `scheduled_lr` is the learning rate without the factor."""
        improved = improves(value, self.best, self.lr_adapt_threshold, self.monitor_mode)
        if improved:
            self.best = value
        self._count(value, improved)
        waiting, self.quiet = self.quiet > 0, max(self.quiet - 1, 0)
        return None if improved or waiting else self._decide(scheduled_lr)

    def _count(self, value: float, improved: bool) -> None:
        self.waited = 0 if improved else self.waited + 1

    def _decide(self, scheduled_lr: float) -> Change | None:
        if self.waited < self.lr_adapt_patience:
            return None
        waited, self.waited = self.waited, 0
        return self._cut(self.lr_adapt_factor, waited, scheduled_lr)

    def _cut(self, by: float, waited: int, scheduled_lr: float) -> Change | None:
        if scheduled_lr * self.factor <= self.min_lr:
            return None
        lowest = self.min_lr / scheduled_lr
        if scheduled_lr * lowest < self.min_lr:  # rounded down, by at most one unit in the last place
            lowest = math.nextafter(lowest, math.inf)
        best = "no finite value so far" if self.best is None else f"best {self.best:.6g}"
        held = f", held by min_lr {self.min_lr:.6g}" if self.factor * by < lowest else ""
        return self._change(max(self.factor * by, lowest), f"no improvement in {waited} observations, {best}{held}")

    def _change(self, after: float, reason: str) -> Change | None:
        if after == self.factor:
            return None
        before, self.factor, self.quiet = self.factor, after, self.cooldown
        return Change(before, after, reason)


@dataclass(kw_only=True)
class Adaptive(Plateau):
    """Three rules; the first that is due and can change the factor does, and no other is tried at that observation:

    1. x `lr_adapt_boost`, up to `max_lr_factor`, where the last `lr_adapt_window` values stagnate: their variance is
       under `lr_adapt_threshold` and they do not fall beyond noise (see `variance_and_fall`; in mode max: do not rise).
       Values that slowly get worse stagnate too.
    2. x `lr_adapt_drop` at `lr_adapt_drop_patience` observations in a row without improvement.
    3. The rule of Plateau.

    Rules 2 and 3 count apart: a count starts again at an improvement, at a boost and at a cut of its own, so rule 3 has
    its turns even where rule 2 is the less patient one. (Not where its patience is `lr_adapt_window` + 1 or less: then
    it is due whenever something may change.) Where `max_lr_factor` leaves no room, a boost passes unsaid and rule 2 is
    next. A value that is not finite empties the window: no boost before it is full of finite ones again.
    """

    lr_adapt_window: int
    lr_adapt_boost: float
    lr_adapt_drop: float
    lr_adapt_drop_patience: int
    max_lr_factor: float
    drop_waited: int = field(default=0, init=False)  # the same for the drop
    values: list[float] = field(default_factory=list, init=False)  # the window, oldest first

    @property
    def cooldown(self) -> int:
        return self.lr_adapt_window if self.lr_adapt_cooldown is None else self.lr_adapt_cooldown

    def _count(self, value: float, improved: bool) -> None:
        super()._count(value, improved)
        self.drop_waited = 0 if improved else self.drop_waited + 1
        self.values = [*self.values, value][-self.lr_adapt_window :] if math.isfinite(value) else []

    def _decide(self, scheduled_lr: float) -> Change | None:
        return self._boost() or self._drop(scheduled_lr) or super()._decide(scheduled_lr)

    def _boost(self) -> Change | None:
        if len(self.values) < self.lr_adapt_window:
            return None
        falling, sign = ("fall", 1) if self.monitor_mode == "min" else ("rise", -1)
        variance, falls = variance_and_fall([sign * value for value in self.values])
        if falls or not variance < self.lr_adapt_threshold:
            return None
        change = self._change(
            max(min(self.factor * self.lr_adapt_boost, self.max_lr_factor), self.factor),
            f"stagnation: the last {len(self.values)} observations do not {falling}, their variance {variance:.3g} is "
            f"under {self.lr_adapt_threshold:.6g}, best {self.best:.6g}",
        )
        if change:
            self.waited = self.drop_waited = 0
        return change

    def _drop(self, scheduled_lr: float) -> Change | None:
        if self.drop_waited < self.lr_adapt_drop_patience:
            return None
        waited, self.drop_waited = self.drop_waited, 0
        return self._cut(self.lr_adapt_drop, waited, scheduled_lr)


def variance_and_fall(values: Sequence[float]) -> tuple[float, bool]:
    """The variance (over n, not n - 1) of n >= 3 values, and whether they fall beyond noise.

    They do where the slope of the least-squares line is more than two of its standard errors below 0: slope < 0 and
    E > 4 (S - E) / (n - 2), with S the sum of squares about the mean and E the part of it that the line explains.
    """
    n, mean = len(values), sum(values) / len(values)
    total = sum((value - mean) * (value - mean) for value in values)
    by_position = sum((i - (n - 1) / 2) * (value - mean) for i, value in enumerate(values))
    explained = by_position * by_position / (n * (n * n - 1) / 12)
    return total / n, by_position < 0 and explained * (n - 2) > 4 * (total - explained)


KINDS: dict[str, type[Plateau]] = {"plateau": Plateau, "adaptive": Adaptive}


def make_multiplier(config: Config) -> Plateau | None:
    """What --lr_adapt asks for, None where it asks for nothing."""
    if config.lr_adapt == "none":
        return None
    kind = KINDS[config.lr_adapt]
    return kind(**{f.name: getattr(config, f.name) for f in fields(kind) if f.init})
