"""The pictures of a run, drawn from its metrics.jsonl: what report/ holds and the monitor shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.diagnosis.drawing import BLUE, GREEN, GREY, PURPLE, RED, draw_bands, new_figure, save_figure
from training.diagnosis.rules import MEMORY, Array, smoothed
from training.records.metrics import read_records

POINTS = 2000  # of a curve that a picture can show
STRETCHES = 25  # that the rate of change is shown for


@dataclass
class Curves:
    """The records of a run by kind."""

    records: list[dict[str, Any]]
    monitor_metric: str = "eval/loss"
    monitor_mode: str = "min"
    grad_clip: float = 0.0

    @cached_property
    def by_kind(self) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for record in self.records:
            found[record["kind"]].append(record)
        return found

    def of(self, kind: str) -> list[dict[str, Any]]:
        return self.by_kind.get(kind, [])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self.of("event") if record.get("event") == name]

    def points(self, name: str, kind: str = "train") -> tuple[Array, Array]:
        """Steps and values of a metric where it has a finite one."""
        pairs = [(r["step"], r[name]) for r in self.of(kind) if isinstance(r.get(name), (int, float))]
        pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
        table = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
        return table[:, 0], table[:, 1]

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best evaluation."""
        steps, values = self.points(self.monitor_metric, "eval")
        if not len(values):
            return None
        place = int(np.argmin(values) if self.monitor_mode == "min" else np.argmax(values))
        return int(steps[place]), float(values[place])

    def bands(self) -> list[tuple[str, float, float]]:
        """The stages as (name, first, last step); none where there is only one."""
        stages, last = self.events("stage"), max((r["step"] for r in self.records), default=0)
        begins = [stage["step"] - 0.5 for stage in stages]
        names = [str(stage.get("name")) for stage in stages]
        return list(zip(names, begins, [*begins[1:], last + 0.5], strict=True)) if len(stages) > 1 else []


def read_curves(run_dir: Path, config: dict[str, Any]) -> Curves:
    """The curves of a run; of `config` (its config.yaml) what says how to read them."""
    wanted = {name: config[name] for name in ("monitor_metric", "monitor_mode", "grad_clip") if config.get(name)}
    path = run_dir / "metrics.jsonl"
    return Curves(read_records(path) if path.exists() else [], **wanted)


def thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most POINTS of the points: of each stretch the smallest and the largest, so that no spike is lost."""
    stretch = math.ceil(2 * len(x) / POINTS)
    if stretch <= 1:
        return x, y
    kept = set()
    for start in range(0, len(x), stretch):
        part = y[start : start + stretch]
        kept |= {start + int(np.argmin(part)), start + int(np.argmax(part))}
    order = np.array(sorted(kept))
    return x[order], y[order]


def span_of(count: int) -> int:
    """Values that a moving average of so many goes over."""
    return max(5, min(100, count // 25))


def centred(values: Array, span: int) -> Array:
    """`smoothed` from both sides, so that the curve does not trail what it smooths; for looking back only."""
    return (smoothed(values, span) + smoothed(values[::-1], span)[::-1]) / 2


def finish(panels: list[Any], curves: Curves) -> None:
    """What all pictures share: all steps of the run from left to right, and the stages."""
    for axes in panels:
        axes.set_xlim(0, 1.01 * max(r["step"] for r in curves.records))
    draw_bands(panels, curves.bands())


def draw_loss(curves: Curves) -> Any:
    steps, losses = curves.points("train/loss")
    if not len(steps):
        return None
    figure, ((axes,),) = new_figure()
    axes.plot(*thinned(steps, losses), color=BLUE, alpha=0.3, linewidth=0.8, label="training")
    means = centred(losses, span_of(len(losses)))
    axes.plot(*thinned(steps, means), color=BLUE, linewidth=1.8, label=f"smoothed over {span_of(len(losses))}")
    eval_steps, eval_losses = curves.points("eval/loss", "eval")
    axes.plot(eval_steps, eval_losses, color=RED, marker="o", markersize=4, linewidth=1.0, label="held out")
    if len(eval_steps):
        place = int(np.argmin(eval_losses))
        at = (eval_steps[place], eval_losses[place])
        best = f"best {at[1]:.4g}, step {int(at[0])}"
        axes.plot(*at, color=GREEN, marker="*", markersize=13, linestyle="none", label=best)
    # The few first losses of new weights are far above all that follows.
    shown = np.concatenate([losses[len(losses) // 50 :], eval_losses])
    top, bottom = float(np.quantile(shown, 0.995)), float(shown.min())
    if losses.max() > bottom + 2 * (top - bottom):
        axes.set_ylim(bottom - 0.05 * (top - bottom), bottom + 1.2 * (top - bottom))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    finish([axes], curves)
    return figure


def draw_learning_rate(curves: Curves) -> Any:
    steps, rates = curves.points("train/learning_rate")
    if not len(steps):
        return None
    figure, ((axes,),) = new_figure(size=(9, 3.5))
    axes.plot(*thinned(steps, rates), color=BLUE, linewidth=1.5)
    for number, change in enumerate(curves.events("learning_rate")):
        axes.axvline(change["step"], color=RED, linewidth=0.8, linestyle=":", label=None if number else "adapted")
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.08 * rates.max() or 1.0))
    axes.yaxis.set_major_formatter("{x:.3g}")
    if curves.events("learning_rate"):
        axes.legend(frameon=False)
    finish([axes], curves)
    return figure


def draw_grad_norm(curves: Curves) -> Any:
    steps, norms = curves.points("train/grad_norm")
    steps, norms = steps[norms > 0], norms[norms > 0]
    if not len(steps):
        return None
    figure, ((axes,),) = new_figure(size=(9, 3.5))
    axes.plot(*thinned(steps, norms), color=PURPLE, alpha=0.35, linewidth=0.8, label="before clipping")
    axes.plot(*thinned(steps, centred(norms, span_of(len(norms)))), color=PURPLE, linewidth=1.6, label="smoothed")
    if curves.grad_clip:
        share = np.mean(norms > curves.grad_clip)
        label = f"clipped to {curves.grad_clip:g} ({100 * share:.0f} % of the logged steps)"
        axes.axhline(curves.grad_clip, color=GREY, linewidth=1.0, linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="gradient norm", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if norms.max() < 20 * norms.min() else "")
    axes.legend(frameon=False)
    finish([axes], curves)
    return figure


def draw_throughput(curves: Curves) -> Any:
    steps, rates = curves.points("train/tokens_per_second")
    if not len(steps):
        return None
    figure, ((axes,),) = new_figure(size=(9, 3.5))
    axes.plot(*thinned(steps, rates), color=GREEN, linewidth=1.2)
    axes.axhline(
        float(np.median(rates)), color=GREY, linewidth=1.0, linestyle="--", label=f"median {np.median(rates):,.0f}"
    )
    axes.set(xlabel="step", ylabel="tokens per second", ylim=(0, 1.08 * rates.max() or 1.0))
    waits = curves.points("train/data_wait_share")
    if len(waits[0]) and np.quantile(waits[1], 0.9) > 0.05:
        other = axes.twinx()
        other.plot(*thinned(waits[0], 100 * waits[1]), color=RED, linewidth=0.8, alpha=0.6)
        other.set_ylabel("% of the time waiting for data", color=RED)
        other.set(ylim=(0, 100))
        other.spines[["top"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    finish([axes], curves)
    return figure


def draw_memory(curves: Curves) -> Any:
    named = {f"{what}, now": curves.points(name, "system") for name, what in MEMORY.items()}
    steps, most = curves.points("memory_usage", "epoch")
    named["most of the first process so far, at the end of an epoch"] = steps, most / 2**30
    named = {name: points for name, points in named.items() if len(points[0]) > 1}
    if not named:
        return None
    figure, ((axes,),) = new_figure(size=(9, 3.5))
    for colour, (name, (steps, sizes)) in zip((BLUE, GREEN, PURPLE), named.items(), strict=False):
        steps, sizes = thinned(steps, sizes)
        axes.plot(steps, sizes, color=colour, marker="o" if len(steps) < 50 else None, markersize=4, label=name)
    axes.set(xlabel="step", ylabel="memory (GiB)", ylim=(0, 1.15 * axes.get_ylim()[1] or 1.0))
    axes.legend(frameon=False)
    finish([axes], curves)
    return figure


def draw_trend(curves: Curves) -> Any:
    """The moving average of the training loss, and below it by how much each stretch differs from the one before."""
    steps, losses = curves.points("train/loss")
    count = min(STRETCHES, len(steps) // 4)
    if count < 3:
        return None
    figure, panels = new_figure(2, size=(9, 5.5), sharex=True)
    (above,), (below,) = panels
    span = 2 * span_of(len(losses))
    above.plot(*thinned(steps, smoothed(losses, span)), color=BLUE, linewidth=1.6)
    above.set(ylabel=f"loss, average over {span}")
    parts = [float(np.mean(part)) for part in np.array_split(losses, count)]
    middles = np.array([float(np.mean(part)) for part in np.array_split(steps, count)])
    changes, width = 100 * (np.array(parts[1:]) / np.maximum(parts[:-1], 1e-9) - 1), float(middles[1] - middles[0])
    for falls, colour, label in ((changes <= 0, GREEN, "fell"), (changes > 0, RED, "rose")):
        below.bar(middles[1:][falls], changes[falls], width=0.9 * width, color=colour, label=label)
    below.set(xlabel="step", ylabel=f"% of change in {width:,.0f} steps")
    below.axhline(0.0, color=GREY, linewidth=0.8)
    below.legend(frameon=False, loc="lower right")
    finish([above, below], curves)
    return figure


PLOTS: dict[str, Callable[[Curves], Any]] = {
    "loss": draw_loss, "learning_rate": draw_learning_rate, "grad_norm": draw_grad_norm,
    "throughput": draw_throughput, "memory": draw_memory, "trend": draw_trend,
}  # fmt: skip


def write_plots(curves: Curves, directory: Path) -> list[Path]:
    """The pictures that the records have data for."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PLOTS.items():
        figure = draw(curves)
        if figure is not None:
            save_figure(figure, directory / f"{name}.png", dots_per_inch=110)
            written.append(directory / f"{name}.png")
    return written
