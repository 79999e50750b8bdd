"""What the curves of a run say about it: pure rules on arrays, each an Alert or None.

A rule looks at the newest records only, so that it can be asked after every log, and says in its advice what it saw, in
which window, and which flag to change. Each is meant to be silent on any run that needs no help: a rule that cries
without need is read once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVELS = INFO, WARNING, ERROR = ("info", "warning", "error")
Z_95, Z_99 = 1.960, 2.576  # normal quantiles of two-sided intervals
RECENT = 400  # newest records that any rule looks at
EVERY = 10  # records from one look of the rules on trends to their next, which cost the most
DECAYED = 0.3  # share of its peak under which the learning rate itself ends the progress


@dataclass(frozen=True)
class Alert:
    level: str  # one of LEVELS
    rule: str
    step: int
    numbers: dict[str, float]
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.rule} at step {self.step}: {self.advice}"


# ---------------------------------------------------------------------------------------------------------------------
# Measures of a curve


def smoothed(values: Array, span: int = 10) -> Array:
    """Exponential moving average over about `span` values, free of the pull of its start; gaps keep the last mean."""
    if not len(values):
        return values
    kernel = (1.0 - 2.0 / (span + 1)) ** np.arange(min(len(values), 20 * span))
    known = np.isfinite(values)
    weights = np.convolve(known.astype(np.float64), kernel)[: len(values)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.convolve(np.where(known, values, 0.0), kernel)[: len(values)] / weights


def theil_sen(x: Array, y: Array, z: float = Z_95) -> tuple[float, float, float]:
    """The median slope between all pairs of points and its confidence interval (Theil 1950, Sen 1968).

    A few outliers do not move it, and nothing is assumed of the noise.
    """
    first, second = np.triu_indices(len(x), k=1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    count, n = len(slopes), len(x)
    reach = z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low, high = math.floor((count - reach) / 2), math.ceil((count + reach) / 2)
    return float(np.median(slopes)), float(slopes[max(low, 0)]), float(slopes[min(high, count - 1)])


def robust_z(value: float, others: Array) -> float:
    """How many standard deviations a value lies above the median of others, by their median absolute deviation."""
    median = float(np.median(others))
    deviation = 1.4826 * float(np.median(np.abs(others - median)))
    return (value - median) / max(deviation, 1e-9 + 1e-3 * abs(median))


# ---------------------------------------------------------------------------------------------------------------------
# The rules. Arrays hold one value per record, the newest last: NaN where a record has none, and infinity for whatever
# was not finite, which the log has as null.


def non_finite(steps: Array, losses: Array, what: str = "training") -> Alert | None:
    """The newest loss was not finite."""
    if not len(losses) or not math.isinf(losses[-1]):
        return None
    return Alert(
        ERROR, "non_finite", int(steps[-1]), {"records": float(np.sum(np.isinf(losses)))},
        f"the {what} loss is not a finite number: lower --learning_rate, set --grad_clip 1, or take --dtype bfloat16 "
        "in place of float16; the samples of a step that was left out are named above it in the log",
    )  # fmt: skip


def non_finite_gradient(steps: Array, window_steps: int = 1000) -> Alert | None:
    """A step was left out; `steps` are those of all that were."""
    if not len(steps):
        return None
    recent = int(np.sum(steps > steps[-1] - window_steps))
    if recent & (recent - 1):  # said of the first and whenever their number has doubled
        return None
    return Alert(
        WARNING, "non_finite_gradient", int(steps[-1]), {"left_out": recent, "window_steps": window_steps},
        f"the gradient was not finite and the step was left out, {recent} in the last {window_steps} steps (the run "
        "ends at 3 in a row): look at the samples that the log names, or lower --learning_rate",
    )  # fmt: skip


def divergence(
    steps: Array, losses: Array, times: float = 1.5, at_least: float = 0.3, records: int = 5, beyond: float = 30.0
) -> Alert | None:
    """The smoothed loss, and most losses themselves, stood above `times` the best smoothed one for so many records.

    Or the newest loss alone is ten times the best and so large (nats) as no data makes it.
    """
    if len(losses) < 2 or not math.isfinite(losses[-1]):
        return None
    means = smoothed(losses)
    best = float(np.fmin.accumulate(means)[-2])
    limit, recent = times * best + at_least, losses[-records:]
    stood = len(losses) > records and np.all(means[-records:] > limit) and np.nanmedian(recent) > limit
    if not stood and not losses[-1] > max(10 * best, beyond):
        return None
    now = float(means[-1]) if stood else float(losses[-1])
    seen = f"has stood above {times:g} times that for {records} records, now" if stood else "is now"
    return Alert(
        ERROR, "divergence", int(steps[-1]),
        {"best": best, "now": now, "times": now / best if best else math.inf, "records": records if stood else 1},
        f"the smoothed training loss was at {best:.4g} and {seen} {now:.4g}: lower --learning_rate (a third is a "
        "start), lengthen --warmup_ratio, keep --grad_clip 1, and go on from a checkpoint before the rise, if there is "
        "one, with --from_resume PATH --allow_change schedule",
    )  # fmt: skip


def spike(steps: Array, losses: Array, window: int = 50, least: int = 20, z_limit: float = 8.0) -> Alert | None:
    """The newest loss is far above the ones before, on the scale on which those differ."""
    before = losses[-window - 1 : -1]
    before = before[np.isfinite(before)]
    if len(before) < least or not math.isfinite(losses[-1]):
        return None
    value, median, z = float(losses[-1]), float(np.median(before)), robust_z(float(losses[-1]), before)
    if z < z_limit or value < 1.25 * median + 0.1:
        return None
    return Alert(
        WARNING, "spike", int(steps[-1]), {"loss": value, "median": median, "z": z, "window_records": len(before)},
        f"the loss jumped to {value:.4g} from a median of {median:.4g} over {len(before)} records (robust z {z:.0f}): "
        "one is often a bad batch of data and heals itself; when they come again lower --learning_rate or --grad_clip",
    )  # fmt: skip


def is_decayed(rates: Array) -> bool:
    """Whether the learning rate is far below its peak, or still rising to it."""
    known = rates[np.isfinite(rates)]
    return not len(known) or known[-1] < DECAYED * known.max() or known[-1] > 1.1 * known[len(known) // 2]


def has_moved(first: float, now: float, share: float = 0.05) -> bool:
    """Whether a loss is no longer where the run began, on whichever side of it."""
    return abs(now / first - 1.0) > share if first > 0.0 else True


def stagnation(
    steps: Array, losses: Array, rates: Array, first: float, least: int = 100, most: int = 300, gain: float = 0.03
) -> Alert | None:
    """No trend in the newest half of the curve, and even the best that the noise allows would gain next to nothing.

    `first`: the loss that the curve began with, which tells a run that got stuck from one that never got going.
    """
    window = min(most, max(least, len(losses) // 2))
    x, y = steps[-window:], losses[-window:]
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) < least or is_decayed(rates[-window:]) or rates[-1] < DECAYED * np.nanmax(rates):
        return None
    level = float(np.median(y))
    if level < 0.05:  # nats: nothing is left to learn
        return None
    slope, low, high = theil_sen(x, y, Z_99)
    span = float(x[-1] - x[0])
    if not low <= 0.0 <= high or -low * span > gain * level:
        return None
    moved = has_moved(first, level)
    return Alert(
        WARNING, "stagnation", int(steps[-1]),
        {"slope_per_1000_steps": 1000 * slope, "low": 1000 * low, "high": 1000 * high, "window_records": len(y),
         "loss": level},
        f"no trend in the training loss of {len(y)} records (steps {int(x[0])} to {int(x[-1])}): the slope per 1000 "
        f"steps is {1000 * slope:+.3g}, 99 % interval {1000 * low:+.3g} to {1000 * high:+.3g}, at a loss of "
        f"{level:.4g}{' after ' + format(first, '.4g') + ' at first' if moved else ', as at first'}. "
        + (
            "Let the learning rate fall now (--lr_schedule cosine or wsd, --lr_adapt plateau), change --learning_rate, "
            "or end the run (--early_stopping_patience); with new weights, take a larger --hidden_size"
            if moved
            else "Raise --learning_rate ten times, and see what is trained: python -m scripts.inspect_data"
        ),
    )  # fmt: skip


def overfitting(
    eval_steps: Array, eval_losses: Array, steps: Array, losses: Array, evaluations: int = 3, rise: float = 0.01
) -> Alert | None:
    """The held-out loss has been rising from its best on while the training loss went on falling."""
    known = np.isfinite(eval_losses)
    eval_steps, eval_losses = eval_steps[known], eval_losses[known]
    if len(eval_losses) <= evaluations or not len(losses):
        return None
    best = int(np.argmin(eval_losses))
    if eval_steps[best] < steps[0]:
        return None
    after = eval_losses[best:]
    if len(after) <= evaluations or np.any(after[-evaluations:] < (1 + rise) * after[0]) or after[-1] < after[1]:
        return None
    means = smoothed(losses)
    then, now = float(means[np.searchsorted(steps, eval_steps[best], side="right") - 1]), float(means[-1])
    if now > (1 - rise) * then:
        return None
    numbers = {"best": float(after[0]), "best_step": float(eval_steps[best]), "now": float(after[-1])}
    return Alert(
        WARNING, "overfitting", int(eval_steps[-1]), {**numbers, "train_then": then, "train_now": now},
        f"the held-out loss has risen from {after[0]:.4g} (step {int(eval_steps[best])}) to {after[-1]:.4g} over "
        f"{len(after) - 1} evaluations while the training loss fell from {then:.4g} to {now:.4g}: keep the best "
        "weights (--save_top_k 1), end earlier (--early_stopping_patience 3, fewer --epochs), or train on more data, "
        "with --dropout or --weight_decay",
    )  # fmt: skip


def lr_too_high(
    steps: Array, norms: Array, losses: Array, rates: Array, clip: float, first: float, window: int = 80,
    share: float = 0.9, fall: float = 0.02,
) -> Alert | None:  # fmt: skip
    """Nearly every step is clipped, by a lot, and the loss falls by less than this share of itself in the window."""
    x, y, n = steps[-window:], losses[-window:], norms[-window:]
    x, y, n = x[np.isfinite(y)], y[np.isfinite(y)], n[np.isfinite(n)]
    if not clip or len(y) < window or len(n) < window or is_decayed(rates[-window:]):
        return None
    clipped, median = float(np.mean(n > clip)), float(np.median(n))
    level = float(np.median(y))
    is_worse = level > 1.1 * float(np.nanmin(smoothed(losses)))
    # Small batches are clipped all the time, and a loss that has not moved is no sign of steps that are too large.
    if clipped < share or median < (2 if is_worse else 5) * clip or not has_moved(first, level):
        return None
    slope, _, high = theil_sen(x, y)
    if high < 0.0 or -slope * float(x[-1] - x[0]) > fall * level:
        return None
    return Alert(
        WARNING, "lr_too_high", int(steps[-1]),
        {"clipped_share": clipped, "median_norm": median, "grad_clip": clip, "window_records": window},
        f"{100 * clipped:.0f} % of the last {window} logged steps were clipped to --grad_clip {clip:g} (median norm "
        f"{median:.3g}) and the loss does not fall: lower --learning_rate to a third, or lengthen --warmup_ratio",
    )  # fmt: skip


def lr_too_low(
    steps: Array, losses: Array, rates: Array, total_steps: int, least: int = 40, most: int = 200, gain: float = 0.1
) -> Alert | None:
    """From its start on the loss falls along a straight line that would lead nowhere before the run ends.

    A curve that learns falls fast and then slowly; one whose steps are too small has not left its first slope.
    """
    if not least <= len(losses) <= most:
        return None
    known = np.isfinite(losses) & (rates >= 0.5 * np.nanmax(rates))  # not in the warmup
    x, y = steps[known], losses[known]
    if len(y) < least:
        return None
    slope, _, high = theil_sen(x, y)
    parts = [float(np.median(part)) for part in np.array_split(y, 3)]
    straight = parts[0] - parts[1] <= 2.0 * (parts[1] - parts[2])
    fall = -slope * (total_steps - x[0]) / parts[0]
    if high >= 0.0 or not straight or fall > gain:
        return None
    return Alert(
        WARNING, "lr_too_low", int(steps[-1]),
        {"slope_per_1000_steps": 1000 * slope, "fall_expected": fall, "learning_rate": float(rates[-1]),
         "window_records": len(y)},
        f"since step {int(x[0])} ({len(y)} records) the loss falls along a straight line, {1000 * slope:+.3g} per 1000 "
        f"steps, and would fall by {100 * fall:.1f} % until the last step: raise --learning_rate ten times",
    )  # fmt: skip


def data_starvation(
    steps: Array, shares: Array, times: Array, window: int = 20, limit: float = 0.3, seconds: float = 30.0
) -> Alert | None:
    """The devices wait for data; `shares` of the time. A window shorter than so many seconds proves nothing."""
    recent = shares[-window:][np.isfinite(shares[-window:])]
    if len(recent) < window or times[-1] - times[-window] < seconds or np.median(recent) < limit:
        return None
    share = float(np.median(recent))
    return Alert(
        WARNING, "data_starvation", int(steps[-1]), {"wait_share": share, "window_records": window},
        f"{100 * share:.0f} % of the time of the last {window} records went by waiting for data: raise --num_workers "
        "(2 to 4 per process, with --persistent_workers 1) and --prefetch_factor, or put --cache_dir on a local disk",
    )  # fmt: skip


def throughput_drop(
    steps: Array, rates: Array, times: Array, window: int = 10, before: int = 50, factor: float = 0.6,
    seconds: float = 30.0,
) -> Alert | None:  # fmt: skip
    """Tokens per second fell far below what they were, and stayed there for so many seconds."""
    if len(rates) < 3 * window + 1 or times[-1] - times[-window] < seconds:
        return None
    now, then = np.median(rates[-window:]), np.median(rates[1:][-window - before : -window])  # the first one warms up
    if not now < factor * then:
        return None
    return Alert(
        WARNING, "throughput_drop", int(steps[-1]),
        {"now": float(now), "before": float(then), "window_records": window},
        f"{now:,.0f} tokens per second over the last {window} records after {then:,.0f} before: see whether another "
        "program uses the device or its memory, whether it is too hot (nvidia-smi), or the disk of --cache_dir is slow",
    )  # fmt: skip


def memory_growth(steps: Array, sizes: Array, what: str, window: int = 30, growth: float = 0.2) -> Alert | None:
    """Memory (GiB) has risen all along the window; what is taken once, or in a part of it only, is no leak."""
    known = np.isfinite(sizes)
    x, y = steps[known][-window:], sizes[known][-window:]
    if len(y) < window or y[0] <= 0:
        return None
    parts = [float(np.median(part)) for part in np.array_split(y, 3)]
    if min(parts[1] / parts[0], parts[2] / parts[1]) < 1 + growth / 3 or parts[2] < (1 + growth) * parts[0]:
        return None
    return Alert(
        WARNING, "memory_growth", int(steps[-1]),
        {"first_gib": parts[0], "last_gib": parts[2], "window_records": window},
        f"{what} memory rose from {parts[0]:.2f} to {parts[2]:.2f} GiB between steps {int(x[0])} and {int(x[-1])} and "
        "goes on rising (in the first epoch, pages of the data read so far are part of it): --num_workers 0 tells "
        "whether loading is the cause; a small --save_interval lets running out cost little",
    )  # fmt: skip


def nothing_to_train(
    steps: Array, tokens: Array, supervised: Array, window: int = 20, share: float = 0.01
) -> Alert | None:
    """Hardly any token is supervised; both counts run from the start of the run."""
    if len(tokens) <= 1:
        return None
    first = max(0, len(tokens) - 1 - window)
    seen, trained = tokens[-1] - tokens[first], supervised[-1] - supervised[first]
    if not trained < share * seen or (trained and len(tokens) <= window):
        return None
    return Alert(
        WARNING if trained else ERROR, "nothing_to_train", int(steps[-1]),
        {"supervised_tokens": float(trained), "tokens": float(seen)},
        f"{int(trained)} of the {int(seen)} tokens since step {int(steps[first])} were supervised: look at the mask "
        "(python -m scripts.inspect_data), then change --train_on, the fields (--prompt_field, --response_field) or "
        "--max_seq_len with --overlong truncate",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# All rules on the records of a run


MEMORY = {"system/gpu0/memory_used_gib": "GPU", "system/ram_used_gib": "main"}
COLUMNS = {
    "train": (
        "step", "time", "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
        "train/data_wait_share", "train/tokens", "train/supervised_tokens",
    ),
    "eval": ("step", "eval/loss"),
    "system": ("step", *MEMORY),
    "non_finite_gradient": ("step",),
}  # fmt: skip


def kind_of(record: dict[str, Any]) -> str:
    """The kind of a record of metrics.jsonl, of an event its name."""
    return str(record.get("event") if record["kind"] == "event" else record["kind"])


class History:
    """The numbers that the rules look at, as columns; a new stage begins a new training curve."""

    def __init__(self, grad_clip: float = 0.0, total_steps: int = 0):
        self.grad_clip, self.total_steps = grad_clip, total_steps
        self.columns = {kind: {name: array("d") for name in names} for kind, names in COLUMNS.items()}

    def add(self, record: dict[str, Any]) -> str:
        """Take a record of metrics.jsonl in; returns what `look` is to be asked for."""
        kind = kind_of(record)
        if kind == "stage":
            for column in self.columns["train"].values():
                del column[:]
        for name, column in self.columns.get(kind, {}).items():
            value = record.get(name, math.nan)
            column.append(value if isinstance(value, (int, float)) else math.inf)
        return kind

    def newest(self, kind: str, count: int = RECENT) -> dict[str, Array]:
        return {name: np.array(column[-count:], dtype=np.float64) for name, column in self.columns[kind].items()}

    def look(self, kind: str) -> Iterator[Alert | None]:
        """What each of the rules says that the newest record of this kind concerns."""
        if kind == "train":
            yield from self._look_at_steps()
        elif kind == "eval":
            held_out, train = self.newest("eval"), self.newest("train", count=0)
            yield non_finite(held_out["step"], held_out["eval/loss"], "held-out")
            yield overfitting(held_out["step"], held_out["eval/loss"], train["step"], train["train/loss"])
        elif kind == "system":
            sizes = self.newest("system")
            for name, what in MEMORY.items():
                yield memory_growth(sizes["step"], sizes[name], what)
        elif kind == "non_finite_gradient":
            yield non_finite_gradient(self.newest(kind)["step"])

    def _look_at_steps(self) -> Iterator[Alert | None]:
        new, count = self.newest("train"), len(self.columns["train"]["step"])
        steps, losses, times, rates = new["step"], new["train/loss"], new["time"], new["train/learning_rate"]
        yield non_finite(steps, losses)
        yield divergence(steps, losses)
        yield spike(steps, losses)
        yield data_starvation(steps, new["train/data_wait_share"], times)
        yield throughput_drop(steps, new["train/tokens_per_second"], times)
        yield nothing_to_train(steps, new["train/tokens"], new["train/supervised_tokens"])
        if count % EVERY == 0:
            begin = [loss for loss in self.columns["train"]["train/loss"][:EVERY] if math.isfinite(loss)]
            first = float(np.median(begin)) if begin else math.nan
            yield stagnation(steps, losses, rates, first)
            yield lr_too_high(steps, new["train/grad_norm"], losses, rates, self.grad_clip, first)
            if count <= RECENT:
                yield lr_too_low(steps, losses, rates, self.total_steps)
