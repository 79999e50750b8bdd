"""report/ of a run: report.md and its pictures, from the files of the run alone.

The trainer has it written when a run ends, and during one, by `--plot_interval`, in a process of its own; anybody else
with `python -m training.diagnosis.report RUN`. A report that cannot be written is said once and never ends a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.config.yaml_files import parse_yaml
from training.control.requests import INTERRUPTED, LATE, LOST_PEER, PREEMPTED
from training.diagnosis.alerts import read_alerts
from training.diagnosis.plots import PLOTS, Curves, read_curves, write_plots
from training.diagnosis.rules import is_decayed, smoothed, theil_sen
from training.records.run_files import read_state
from training.text import as_text, cell, change, duration, number, table

logger = logging.getLogger("train")

ROOT = Path(__file__).resolve().parent.parent.parent
HURRIED = (INTERRUPTED, PREEMPTED, LATE, LOST_PEER)  # ends after which somebody waits for the process to be gone
SAMPLES, LAST_ALERTS, LAST_CHANGES = 4, 20, 20
TREND_POINTS = 200  # of the end of the loss curve
TITLES = {
    "loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm", "throughput": "Throughput",
    "memory": "Memory", "trend": "Moving average of the training loss and its rate of change",
}  # fmt: skip


def write_report(run_dir: Path, plots: bool = True) -> Path:
    """Write report/report.md and, unless there is no time for it, the plots. Raises what `read_state` raises."""
    state, config = read_state(run_dir), config_of(run_dir)
    curves = read_curves(run_dir, config)
    directory = run_dir / "report"
    directory.mkdir(exist_ok=True)
    if plots:
        write_plots(curves, directory)
    text = "\n".join(report_lines(run_dir, state, config, curves)) + "\n"
    temporary = directory / f".report.md.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, directory / "report.md")
    return directory / "report.md"


@contextlib.contextmanager
def reported(run_dir: Path, wanted: bool) -> Iterator[None]:
    """Around a run: its report when it has ended, well or with an error."""
    try:
        yield
    except Exception:
        if wanted:
            report_at_end(run_dir)
        raise
    if wanted:
        report_at_end(run_dir)


def report_at_end(run_dir: Path) -> None:
    """The last words of the process that trained; plots only where nobody waits for it to be gone."""
    try:
        state = json.loads((run_dir / "state.json").read_text(encoding="utf-8"))
        if state.get("pid") != os.getpid() or not (run_dir / "metrics.jsonl").exists():
            return  # the directory still tells of another run
        path = write_report(run_dir, plots=state.get("exit_reason") not in HURRIED)
        logger.info("report: %s", path)
    except Exception as error:  # whatever it is, the run itself is over and its result safe
        logger.warning("the report could not be written: %s: %s", type(error).__name__, error)


class ReportEvery:
    """Follows the metrics and has the report written now and then, one at a time, by another process."""

    def __init__(self, run_dir: Path, interval: str):
        self.run_dir, self.epochs = run_dir, interval.endswith("epoch")
        self.every = int(interval.removesuffix("epoch"))
        self.done: int | None = None  # intervals
        self.job: subprocess.Popen[bytes] | None = None

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] != ("epoch" if self.epochs else "train"):
            return
        position = record["epoch"] - (not record["complete"]) if self.epochs else record["step"]
        before = (position - 1) // self.every if self.done is None else self.done
        self.done = position // self.every
        if self.done > before and (self.job is None or self.job.poll() is not None):
            command = [sys.executable, "-m", "training.diagnosis.report", "--background", str(self.run_dir.resolve())]
            quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
            settings = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.job = subprocess.Popen(command, cwd=ROOT, env=settings, **quiet)  # type: ignore[call-overload]

    def close(self) -> None:
        if self.job is not None:
            with contextlib.suppress(ProcessLookupError):
                self.job.terminate()
            self.job.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The text


def report_lines(run_dir: Path, state: dict[str, Any], config: dict[str, Any], curves: Curves) -> Iterator[str]:
    yield f"# {cell(run_dir.resolve().name)}: {state['status']}"
    yield ""
    yield f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}, from the files in {cell(run_dir.resolve())}."
    alerts = read_alerts(run_dir)
    for title, lines in (
        ("Result", _result(state, curves)),
        ("Recommendations", _recommendations(run_dir, state, config, curves, alerts)),
        ("Alerts", _alerts(alerts)),
        ("Convergence", _convergence(curves)),
        ("Learning rate", _learning_rate(curves)),
        ("Speed and memory", _speed(curves)),
        ("Epochs", _epochs(curves)),
        ("Checkpoints", _checkpoints(run_dir, config)),
        ("Samples", _samples(curves)),
        ("Data", _data(run_dir)),
        ("Plots", _plots(run_dir)),
    ):
        found = list(lines)
        if found:
            yield from ("", f"## {title}", "", *found)


def _result(state: dict[str, Any], curves: Curves) -> Iterator[str]:
    train, best = curves.of("train"), curves.best()
    step, total = state.get("step", 0), state.get("total_steps") or 0
    share = f" ({100 * step / total:.1f} %)" if total else ""
    rows: list[tuple[str, str]] = [("status", str(state["status"])), ("steps", f"{step:,} of {total:,}{share}")]
    if state.get("exit_reason"):
        rows.append(("ended by", str(state["exit_reason"])))
    if train:
        last = train[-1]
        rows.append(("epochs trained", f"{last.get('train/epoch', 0):.3g}"))
        tokens = f"{last.get('train/tokens', 0):,}, {last.get('train/supervised_tokens', 0):,} of them supervised"
        rows.append(("tokens trained", tokens))
        lost = "train/loss" in last.get("non_finite", ())
        rows.append(("training loss, last logged", "not finite" if lost else number(last.get("train/loss"))))
    if best:
        name, epoch = curves.monitor_metric, _epoch_at(curves, best[0])
        rows.append((f"best {name}", f"{best[1]:.4f}, step {best[0]:,}, epoch {epoch}"))
        rows.append((f"last {name}", f"{curves.points(name, 'eval')[1][-1]:.4f}"))
    if curves.records:
        wall = curves.records[-1]["time"] - curves.records[0]["time"]
        rows.append(("time", f"{duration(_training_seconds(train))} of training, {duration(wall)} from first to last"))
    yield from table(("", ""), rows)


def _recommendations(
    run_dir: Path, state: dict[str, Any], config: dict[str, Any], curves: Curves, alerts: list[dict[str, Any]]
) -> Iterator[str]:
    """What to do next: first what the alerts advise, then what the result itself suggests."""
    newest = {alert["rule"]: alert for alert in alerts}
    for alert in newest.values():
        yield f"- **{cell(alert['rule'])}** (step {alert['step']}): {cell(alert.get('advice'))}"
    if state["status"] in ("stopped", "crashed", "failed") and state.get("step"):
        saved = any((run_dir / "checkpoints").glob("step-*/manifest.json"))
        place = "goes on from the last checkpoint" if saved else "begins again, for nothing was saved"
        yield f"- The run is not done: the same command with `--from_resume 1` {place}."
    steps, losses = curves.points("eval/loss", "eval")
    if not len(steps) and curves.of("train"):
        yield (
            "- Nothing was held out, so nobody can tell learning from memorising: `--val_fraction 0.05`, or "
            "`--val_data_path`."
        )
    if state["status"] == "completed" and len(losses) > 1:
        if int(np.argmin(losses)) == len(losses) - 1:
            if losses[-1] < 0.99 * losses[-2]:
                yield (
                    "- The last evaluation is the best and was still falling: more `--epochs` would go on improving "
                    "(a new run on the result with `--from_weight`)."
                )
        elif losses[-1] > 1.01 * losses.min() and not config.get("save_top_k"):
            best = int(steps[int(np.argmin(losses))])
            yield f"- The best held-out loss was at step {best:,}; keep those weights next time with `--save_top_k 1`."
    if not newest and state["status"] == "completed":
        yield "- No rule found anything wrong with the curves."


def _alerts(alerts: list[dict[str, Any]]) -> Iterator[str]:
    if not alerts:
        yield "None."
        return
    counts = Counter(str(alert.get("level")) for alert in alerts)
    yield ", ".join(f"{count} of level {cell(level)}" for level, count in counts.items()) + "; the newest:"
    yield ""
    rows = [
        (str(a["step"]), str(a.get("level")), str(a["rule"]),
         ", ".join(f"{name} {number(value)}" for name, value in (a.get("numbers") or {}).items()))
        for a in alerts[-LAST_ALERTS:]
    ]  # fmt: skip
    yield from table(("step", "level", "rule", "numbers"), rows)


def _convergence(curves: Curves) -> Iterator[str]:
    """How far the loss has come and whether it still moves."""
    steps, losses = curves.points("train/loss")
    if len(steps) < 10:
        return
    means = smoothed(losses, max(3, len(losses) // 40))
    first, last, lowest = float(np.median(losses[:3])), float(means[-1]), int(np.argmin(means))
    yield (
        f"- Training loss from {first:.4g} to {last:.4g} (smoothed, {change(first, last)}); its "
        f"lowest was {means[lowest]:.4g} at step {int(steps[lowest]):,}."
    )
    parts = [chunk for chunk in np.array_split(means, 4) if len(chunk)]
    changes = ", ".join(change(float(part[0]), float(part[-1])) for part in parts)
    yield f"- Change in each quarter of the run: {changes}."
    x, y = steps[-TREND_POINTS:], losses[-TREND_POINTS:]
    x, y = x[len(x) // 2 :] if len(steps) < TREND_POINTS else x, y[len(y) // 2 :] if len(steps) < TREND_POINTS else y
    slope, low, high = theil_sen(x, y)
    moves = "still falls" if high < 0 else "rises" if low > 0 else "shows no trend"
    _, rates = curves.points("train/learning_rate")
    late = ", at a learning rate near the end of its fall" if is_decayed(rates) else ""
    yield (
        f"- Over the last {len(x)} records (from step {int(x[0]):,}) it {moves}: {1000 * slope:+.3g} per 1000 steps, "
        f"95 % interval {1000 * low:+.3g} to {1000 * high:+.3g}{late}."
    )
    noise = float(np.median(np.abs(y - np.median(y)))) * 1.4826
    share = 100 * noise / max(float(np.median(y)), 1e-9)
    yield f"- Noise from record to record: {noise:.3g}, {share:.1f} % of the loss."
    eval_steps, eval_losses = curves.points("eval/loss", "eval")
    if len(eval_losses) > 1:
        since = len(eval_losses) - 1 - int(np.argmin(eval_losses))
        gap = float(eval_losses[-1]) - last
        yield (
            f"- Held-out loss from {eval_losses[0]:.4g} to {eval_losses[-1]:.4g} in {len(eval_losses)} evaluations, "
            f"{since} of them since the best; {abs(gap):.3g} {'above' if gap > 0 else 'below'} the training loss."
        )


def _learning_rate(curves: Curves) -> Iterator[str]:
    steps, rates = curves.points("train/learning_rate")
    if not len(steps):
        return
    peak = int(np.argmax(rates))
    yield (
        f"- Highest {rates[peak]:.3g} at step {int(steps[peak]):,}, lowest {rates.min():.3g}, mean {rates.mean():.3g}, "
        f"last {rates[-1]:.3g}."
    )
    _, norms = curves.points("train/grad_norm")
    if len(norms):
        clip = curves.grad_clip
        clipped = (
            f", {100 * np.mean(norms > clip):.0f} % of the logged steps above --grad_clip {clip:g}" if clip else ""
        )
        yield f"- Gradient norm before clipping: median {np.median(norms):.3g}, highest {norms.max():.3g}{clipped}."
    changes = curves.events("learning_rate")
    if changes:
        by_reason = Counter(str(change.get("reason")) for change in changes)
        counted = ", ".join(f"{count} by {reason}" for reason, count in by_reason.items())
        yield f"- Its multiplier was changed {len(changes)} times ({cell(counted)}):"
        yield ""
        rows = [
            (str(c["step"]), number(c.get("before")), number(c.get("after")), str(c.get("reason")))
            for c in changes[-LAST_CHANGES:]
        ]
        yield from table(("step", "before", "after", "reason"), rows)


def _speed(curves: Curves) -> Iterator[str]:
    _, rates = curves.points("train/tokens_per_second")
    if len(rates):
        low, middle, high = np.quantile(rates, (0.05, 0.5, 0.95))
        yield f"- Tokens per second: median {middle:,.0f}, 90 % of the records between {low:,.0f} and {high:,.0f}."
    for name, words in (("train/seconds_per_step", "Seconds per step"), ("train/mfu", "Share of the devices' peak")):
        _, values = curves.points(name)
        if len(values):
            yield f"- {words}: median {np.median(values):.3g}."
    _, waits = curves.points("train/data_wait_share")
    if len(waits):
        yield f"- Waiting for data: {100 * np.mean(waits):.1f} % of the time."
    _, memory = curves.points("memory_usage", "epoch")
    if len(memory):
        yield f"- Most memory of the first process: {memory.max() / 2**30:.2f} GiB."


def _epochs(curves: Curves) -> Iterator[str]:
    names = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")
    rows = [
        (*(number(r.get(name)) for name in names), duration(r.get("time_per_epoch") or 0.0))
        for r in curves.of("epoch")[-50:]
    ]
    if rows:
        yield from table((*(name.replace("_", " ") for name in names), "time"), rows)


def _checkpoints(run_dir: Path, config: dict[str, Any]) -> Iterator[str]:
    metric = config.get("monitor_metric", "eval/loss")
    rows = []
    for path in sorted((run_dir / "checkpoints").glob("step-*/manifest.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            size = sum(file["size"] for file in manifest["files"]) / 2**20
            rows.append((path.parent.name, f"{size:,.1f}", number(manifest["metrics"].get(metric))))
    if rows:
        yield from table(("checkpoint", "MiB", metric), rows)
    for name in ("final", "best"):
        if (run_dir / name).is_dir():
            yield ""
            yield f"The model of `{name}/` is complete: `python -m scripts.chat {run_dir / name}`"


def _samples(curves: Curves) -> Iterator[str]:
    samples = curves.events("sample")
    if not samples:
        return
    newest = [s for s in samples if s["step"] == samples[-1]["step"]]
    exact = sum(bool(s.get("exact")) for s in newest)
    yield f"{exact} of {len(newest)} answers after step {newest[0]['step']:,} are exactly the expected ones."
    for sample in newest[:SAMPLES]:
        parts = [f"{name}:\n{sample.get(name)}" for name in ("prompt", "expected", "answer")]
        yield from ("", *as_text("\n\n".join(parts)))


def _data(run_dir: Path) -> Iterator[str]:
    try:
        report = json.loads((run_dir / "data_report.json").read_text(encoding="utf-8"))
        parts = {name: part for name, part in report.items() if isinstance(part, dict)}
    except (OSError, ValueError, AttributeError):
        return
    names = ("rows_read", "rows_kept", "rows_rejected", "samples", "samples_dropped", "samples_truncated", "duplicates",
             "tokens", "supervised_tokens", "supervised_share", "rows", "padding_share")  # fmt: skip
    rows = [(name.replace("_", " "), *(number(part.get(name)) for part in parts.values())) for name in names]
    yield from table(("", *(name.replace("_", " ") for name in parts)), rows)
    yield ""
    files = {source.get("path"): source for part in parts.values() for source in part.get("sources", [])}
    for path, source in files.items():
        yield f"- {cell(path)}: {cell(number(source.get('rows_read')))} rows ({cell(source.get('layout'))})"


def _plots(run_dir: Path) -> Iterator[str]:
    for name in PLOTS:
        if (run_dir / "report" / f"{name}.png").exists():
            yield from (f"### {TITLES[name]}", "", f"![{TITLES[name]}]({name}.png)", "")


def _epoch_at(curves: Curves, step: int) -> str:
    done = [r.get("train/epoch", 0.0) for r in curves.of("train") if r["step"] <= step]
    return f"{done[-1]:.2f}" if done else "0"


def _training_seconds(train: list[dict[str, Any]]) -> float:
    """Time spent in steps, which pauses and evaluations and what lies between two parts of a run are not."""
    steps = [0, *(record["step"] for record in train)]
    shares = (record.get("train/seconds_per_step") or 0.0 for record in train)
    return float(sum(share * (b - a) for a, b, share in zip(steps, steps[1:], shares, strict=False)))


def config_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    with contextlib.suppress(OSError, ValueError):
        config = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        return config if isinstance(config, dict) else {}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.diagnosis.report", description="Writes the report of a run."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--background", action="store_true", help="leave the processor to whoever wants it")
    options = parser.parse_args(argv)
    if options.background:
        os.nice(19)
    try:
        print(f"report: {write_report(options.run)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 74 if isinstance(error, OSError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
