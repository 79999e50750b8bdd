"""Pure functions of the position in a run: the share of the peak learning rate, with no memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LRSchedule:
    """The shape of a learning rate; each kind uses the fields that its function below names."""

    kind: str = "cosine"
    warmup_steps: int = 0  # of any kind: step / warmup_steps comes first
    floor: float = 0.1  # where cosine, cosine_restarts, linear, polynomial, wsd and one_cycle end
    cycles: int = 4
    decay_ratio: float = 0.2
    power: float = 2.0
    interval: str | None = None  # steps or 'Nepoch'
    gamma: float | None = None
    milestones: tuple[str, ...] = ()  # like the interval
    peak_ratio: float = 0.3
    start_ratio: float | None = None
    warmup_epochs: int = 10


def warmup_steps_of(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """Steps of warmup, given as a number or as a share of the run (rounded up); never longer than the run."""
    return min(warmup_steps or math.ceil(warmup_ratio * total_steps), total_steps)


def lr_factor(schedule: LRSchedule, step: int, total_steps: int, epoch: int = 0) -> float:
    """Share of the peak learning rate at `step` (1 ... total_steps) in mini-epoch `epoch` (from 0) of a stage.

    Warmup rises as step / warmup_steps; what follows sees the remaining steps.
    """
    assert 1 <= step <= total_steps, (step, total_steps)
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    shape = SHAPES[schedule.kind]
    return shape(schedule, step - schedule.warmup_steps, total_steps - schedule.warmup_steps, epoch)


def _constant(_schedule: LRSchedule, _step: int, _steps: int, _epoch: int) -> float:
    return 1.0


def _linear(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """floor + (1 - floor) (1 - p) with the progress p = step / steps; so written, it ends at the floor exactly."""
    return schedule.floor + (1.0 - schedule.floor) * (1.0 - step / steps)


def _cosine(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """floor + (1 - floor) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, eq. 5)."""
    return _fall(schedule.floor, step / steps)


def _cosine_restarts(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """`cycles` cosines of the same length; the last step of each is at the floor (ibid., T_mult = 1)."""
    cycle = -(-step * schedule.cycles // steps) - 1  # whole numbers: the end of a cycle is never missed by rounding
    return _fall(schedule.floor, step * schedule.cycles / steps - cycle)


def _wsd(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """Warmup, stable, decay (Hu et al. 2024): 1, and over the last `decay_ratio` of the steps linear to the floor."""
    return schedule.floor + (1.0 - schedule.floor) * min(1.0, (1.0 - step / steps) / schedule.decay_ratio)


def _polynomial(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """floor + (1 - floor) (1 - p)^power."""
    return schedule.floor + (1.0 - schedule.floor) * math.pow(1.0 - step / steps, schedule.power)


def _step(schedule: LRSchedule, step: int, _steps: int, epoch: int) -> float:
    """x gamma (0.1) after every `interval` (30epoch)."""
    return _gamma(schedule, 0.1) ** _times(schedule.interval or "30epoch", step, epoch)


def _multistep(schedule: LRSchedule, step: int, _steps: int, epoch: int) -> float:
    """x gamma (0.1) after each of the `milestones`."""
    return _gamma(schedule, 0.1) ** sum(_times(each, step, epoch) > 0 for each in schedule.milestones)


def _exponential(schedule: LRSchedule, step: int, _steps: int, epoch: int) -> float:
    """x gamma (0.95) after every `interval` (1epoch)."""
    return _gamma(schedule, 0.95) ** _times(schedule.interval or "1epoch", step, epoch)


def _one_cycle(schedule: LRSchedule, step: int, steps: int, _epoch: int) -> float:
    """A cosine from start_ratio (0.04) to 1 over `peak_ratio` of the steps and one down to the floor (Smith 2018).

    The first step is at start_ratio, the last at the floor, as in torch's OneCycleLR.
    """
    start, peak = 0.04 if schedule.start_ratio is None else schedule.start_ratio, schedule.peak_ratio * steps - 1
    if step - 1 <= peak:
        return _fall(start, 1.0 - (step - 1) / peak) if peak > 0 else 1.0
    return _fall(schedule.floor, (step - 1 - peak) / (steps - 1 - peak))


def _mini_epoch(schedule: LRSchedule, _step: int, _steps: int, epoch: int) -> float:
    """From start_ratio (0.1) in the first mini-epoch to 1 in number `warmup_epochs`, then x gamma (0.95) for each."""
    start, last = 0.1 if schedule.start_ratio is None else schedule.start_ratio, schedule.warmup_epochs - 1
    if epoch < last:
        return start + (1.0 - start) * epoch / last
    return _gamma(schedule, 0.95) ** (epoch - last)


def _fall(floor: float, progress: float) -> float:
    """Half a cosine from 1 at progress 0 to the floor at 1."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _gamma(schedule: LRSchedule, default: float) -> float:
    return default if schedule.gamma is None else schedule.gamma


def _times(interval: str, step: int, epoch: int) -> int:
    """How often an interval of steps or epochs has passed before this step."""
    if interval.endswith("epoch"):
        return epoch // int(interval.removesuffix("epoch"))
    return (step - 1) // int(interval)


SHAPES: dict[str, Callable[[LRSchedule, int, int, int], float]] = {
    "cosine": _cosine, "linear": _linear, "constant": _constant, "cosine_restarts": _cosine_restarts, "wsd": _wsd,
    "polynomial": _polynomial, "step": _step, "multistep": _multistep, "exponential": _exponential,
    "one_cycle": _one_cycle, "mini_epoch": _mini_epoch,
}  # fmt: skip
