"""Watches a run by its files: a live view in a terminal, plots and a report. Nothing of it reaches into the training.

    python -m scripts.monitor runs/full_sft
    python -m scripts.monitor runs/full_sft --mode report

`all` is the live view with plots and report written at each interval, `monitor` the view alone, `plot` and `report`
write once (`plot` with an --interval again and again while the run lives). It ends with the run; Ctrl-C leaves it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

from training.diagnosis.alerts import read_alerts
from training.diagnosis.plots import read_curves, write_plots
from training.diagnosis.report import config_of, write_report
from training.diagnosis.rules import ERROR, MEMORY
from training.records.run_files import run_state, runs_beside
from training.text import duration, one_line

INTERVAL_SECONDS, REFRESH_SECONDS = 30.0, 2.0
BLOCKS = "▁▂▃▄▅▆▇█"
ARROWS = {-1: "↓", 0: "→", 1: "↑"}
SPARK_POINTS, ALERTS_SHOWN = 60, 4
RED, YELLOW, BOLD, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"
ENDED = ("completed", "stopped", "failed", "crashed")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def seconds(text: str) -> float:
        value = float(text)
        if not 0.1 <= value <= 86400.0:
            raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 86400 seconds")
        return value

    parser = argparse.ArgumentParser(prog="python -m scripts.monitor", description=__doc__.split(":")[0] + ".")
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    modes = ("all", "plot", "monitor", "report")
    parser.add_argument("--mode", choices=modes, default="all", help="default all")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=seconds,
        help=f"between two plots or reports, or two lines where there is no terminal (default {INTERVAL_SECONDS:g})",
    )  # fmt: skip
    return parser.parse_args(argv)


class Tail:
    """The records of a metrics.jsonl that may grow, be cut back or be replaced between two looks."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._inode, self._place, self._rest = 0, 0, b""

    def read(self) -> None:
        """Take in what is new; an exchanged or shortened file from its beginning."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._place:
                    self.records, self._inode, self._place, self._rest = [], status.st_ino, 0, b""
                file.seek(self._place)
                new = file.read()
        except FileNotFoundError:
            return
        self._place += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self.records.append(record)

    def values(self, name: str, kind: str = "train") -> list[float]:
        found = [r.get(name) for r in self.records if r.get("kind") == kind]
        return [value for value in found if isinstance(value, (int, float))]


def sparkline(values: list[float], points: int = SPARK_POINTS) -> str:
    """The curve in one line: the mean of each of so many stretches as a block between the lowest and the highest."""
    count = min(points, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    if not means:
        return ""
    low, height = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (mean - low) / height)] if height else BLOCKS[0] for mean in means)


def arrow(values: list[float]) -> str:
    """Where the newest tenth of a curve went against the tenth before it, by more than a hundredth."""
    part = max(1, min(20, len(values) // 10))
    if len(values) < 2 * part or part < 1:
        return ARROWS[0]
    now, before = sum(values[-part:]) / part, sum(values[-2 * part : -part]) / part
    change = (now - before) / max(abs(before), 1e-12)
    return ARROWS[0 if abs(change) < 0.01 else 1 if change > 0 else -1]


def bar(share: float, width: int) -> str:
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def alert_text(alert: dict[str, Any]) -> str:
    return one_line(f"{alert.get('level')}: {alert['rule']} at step {alert['step']}: {alert.get('advice')}")


class View:
    """What there is to say about a run now, from its files."""

    def __init__(self, run: Path):
        self.run, self.tail = run, Tail(run / "metrics.jsonl")
        self.metric = str(config_of(run).get("monitor_metric", "eval/loss"))
        self.look()

    def look(self) -> None:
        self.tail.read()
        self.state, self.alerts = run_state(self.run), read_alerts(self.run)
        trained = [record for record in self.tail.records if record.get("kind") == "train"]
        self.last: dict[str, Any] = trained[-1] if trained else {}

    @property
    def status(self) -> str:
        return self.state.status

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def number(self, name: str, form: str = ".4f", scale: float = 1.0) -> str:
        value = self.last.get(name)
        return format(scale * value, form) if isinstance(value, (int, float)) else "-"

    def line(self) -> str:
        """The run in one line, for a place that is no terminal."""
        step, total = self.state.step or 0, self.state.total_steps or 0
        parts = [self.status, f"step {step}/{total}"]
        if self.last:
            parts += [f"loss {self.number('train/loss')} {arrow(self.tail.values('train/loss'))}"]
            parts += [
                f"lr {self.number('train/learning_rate', '.2e')}",
                f"norm {self.number('train/grad_norm', '.2f')}",
            ]
            parts += [f"{self.number('train/tokens_per_second', ',.0f')} tokens/s"]
        held_out = self.tail.values(self.metric, "eval")
        if held_out:
            parts.append(f"{self.metric} {held_out[-1]:.4f} {arrow(held_out)}")
        if self.status == "running" and isinstance(self.last.get("eta_seconds"), (int, float)):
            parts.append(f"eta {duration(self.eta())}")
        if self.has_ended and self.state.exit_reason:
            parts.append(one_line(self.state.exit_reason))
        if self.alerts:
            parts.append(f"{len(self.alerts)} alerts")
        return "  ".join(parts)

    def eta(self) -> float:
        """Seconds left, by the pace of the newest record from where the run is now."""
        left, pace = (self.state.total_steps or 0) - (self.state.step or 0), self.last.get("train/seconds_per_step")
        return max(0, left) * pace if isinstance(pace, (int, float)) else 0.0

    def screen(self, width: int) -> list[str]:
        """The run as lines of at most so many characters, escape sequences not counted."""
        step, total = self.state.step or 0, self.state.total_steps or 0
        share, losses, held_out = self.state.share or 0.0, *(
            self.tail.values(*names) for names in (("train/loss",), (self.metric, "eval"))
        )  # fmt: skip
        reason = f" ({one_line(self.state.exit_reason)})" if self.state.exit_reason else ""
        lines = [f"{self.run}  {self.status}{reason}"[:width]]
        lines[0] = BOLD + lines[0] + PLAIN
        eta = f"  eta {duration(self.eta())}" if self.status == "running" and self.last else ""
        counts = f" {100 * share:5.1f} %  step {step:,}/{total:,}  epoch {self.number('train/epoch', '.2f')}{eta}"
        lines.append(bar(share, max(10, min(60, width - len(counts)))) + counts)
        lines.append("")
        if self.last:
            columns = [
                f"loss {self.number('train/loss')} {arrow(losses)}",
                f"lr {self.number('train/learning_rate', '.2e')} {arrow(self.tail.values('train/learning_rate'))}",
                f"norm {self.number('train/grad_norm', '.2f')} {arrow(self.tail.values('train/grad_norm'))}",
                f"accuracy {self.number('train/token_accuracy', '.1f', 100)} %",
            ]
            lines.append("   ".join(columns))
            lines.append(
                f"{self.number('train/tokens_per_second', ',.0f')} tokens/s   "
                f"{self.number('train/seconds_per_step', '.3g')} s/step   "
                f"waiting for data {self.number('train/data_wait_share', '.0f', 100)} %   {self.memory()}"
            )
            points = max(10, min(SPARK_POINTS, width - 30))
            lines.append("")
            lines.append(f"training  {sparkline(losses, points)} {losses[0]:.3g} to {losses[-1]:.3g}" if losses else "")
        if held_out:
            best = min(held_out)
            lines.append(f"held out  {sparkline(held_out, max(10, min(SPARK_POINTS, width - 50)))} "
                         f"{self.metric} {held_out[-1]:.4g} {arrow(held_out)}, lowest {best:.4g}")  # fmt: skip
        lines.append("")
        lines += self.alert_lines(width)
        return [line if "\x1b" in line else line[:width] for line in lines]

    def memory(self) -> str:
        """The newest memory that a record tells of."""
        for record in reversed(self.tail.records[-500:]):
            for name, scale in (*((name, 1) for name in MEMORY), ("memory_usage", 2**30)):
                if isinstance(record.get(name), (int, float)):
                    return f"memory {record[name] / scale:.2f} GiB"
        return ""

    def alert_lines(self, width: int) -> list[str]:
        lines = [] if self.alerts else ["no alerts"]
        for alert in self.alerts[-ALERTS_SHOWN:]:
            colour = RED if alert.get("level") == ERROR else YELLOW
            wrapped = textwrap.wrap(alert_text(alert), width, max_lines=3, placeholder=" …")
            lines += [colour + line + PLAIN for line in wrapped]
        return lines


class Drawer:
    """Writes plots and report beside the view, which goes on meanwhile; one that fails is said once."""

    def __init__(self, run: Path):
        self.run, self.problem = run, ""
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def draw(self, interval: float) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        if self._thread is None or time.monotonic() - self._began >= interval:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self.write, daemon=True)
            self._thread.start()

    def write(self) -> None:
        try:
            write_report(self.run)
            self.problem = ""
        except Exception as error:  # a file that is being replaced, a full disk: the next one may succeed
            self.problem = f"the report could not be written: {error}"

    def finish(self) -> None:
        """The last one, of the run as it ended; the trainer itself may be writing the same, each file whole."""
        if self._thread is not None:
            self._thread.join()
        self.write()


class Screen:
    """Shows a view in a terminal, over the one before."""

    def __init__(self) -> None:
        print("\x1b[2J", end="")

    def show(self, view: View, problem: str) -> None:
        size = shutil.get_terminal_size()
        lines = [*view.screen(size.columns), *([one_line(problem)] if problem else ())][: size.lines - 1]
        print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)


class Lines:
    """Shows a view as one line at each interval in which something happened, and each alert once."""

    def __init__(self, interval: float):
        self.interval, self._told, self._at, self._line = interval, 0, -math.inf, ""

    def show(self, view: View, problem: str) -> None:
        for alert in view.alerts[self._told :]:
            print(f"{alert_text(alert)}", flush=True)
        self._told = len(view.alerts)
        line, now = "  ".join(filter(None, (view.line(), one_line(problem)))), time.monotonic()
        if line != self._line and (view.has_ended or now - self._at >= self.interval):
            self._line, self._at = line, now
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def watch(run: Path, interval: float, draws: bool) -> None:
    """Show the run until it ends."""
    view, drawer = View(run), Drawer(run)
    shown = Screen() if sys.stdout.isatty() else Lines(interval)
    while True:
        shown.show(view, drawer.problem)
        if view.has_ended:
            break
        if draws:
            drawer.draw(interval)
        time.sleep(min(interval, REFRESH_SECONDS))
        view.look()
    if draws:
        drawer.finish()
        print(drawer.problem or f"report: {run}/report/report.md")


def draw_once(run: Path, mode: str) -> bool:
    """Write the plots or the report; returns whether the run has ended."""
    status = run_state(run).status
    if mode == "report":
        print(f"report: {write_report(run)}", flush=True)
    else:
        written = write_plots(read_curves(run, config_of(run)), run / "report")
        print(f"plots: {', '.join(map(str, written)) or 'nothing was logged yet'}", flush=True)
    return status in ENDED


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    run, interval = options.run, options.interval or INTERVAL_SECONDS
    try:
        run_state(run)
        if options.mode in ("all", "monitor"):
            watch(run, interval, draws=options.mode == "all")
        else:
            while not draw_once(run, options.mode) and options.interval and options.mode == "plot":
                time.sleep(interval)
    except FileNotFoundError:
        print(f"error: {runs_beside(run)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 74
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
