"""What a run says while it runs: state.json, lines on screen, records of steps and epochs. Rank 0 alone speaks."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from training.control.requests import ALERT
from training.records.metrics import MetricsLog, Record, Sink, strict
from training.records.system import SystemWatch
from training.schedule.plan import Plan
from training.schedule.train_state import LoopState
from training.text import duration

logger = logging.getLogger("train")

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def peak_flops(device_name: str, devices: int) -> float | None:
    """FLOP/s that this many devices could do at best; None for a device whose peak is not known here."""
    return next((peak * devices for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class StateFile:
    """state.json: what the run is doing, replaced atomically, at most once a second unless the status changes."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {"status": "pending", "pid": os.getpid(), "host": socket.gethostname()}
        self._written_at = 0.0

    def say(self, status: str, clears: bool = False, **more: Any) -> None:
        """Say so of the run wherever it is, before it trains or after it failed, and keep what else is said.

        A finished run that could not be gone on with stays finished, and one that is still to be cleared as it was.
        """
        said = self.read()
        if said.get("status") == "completed" or (clears and said and said.get("pid") != os.getpid()):
            return
        kept = {name: value for name, value in said.items() if name not in ("exit_reason", "exit_code")}
        self.values = {**kept, **self.values, "status": status, "updated_at": time.time(), **more}
        self._write()

    def read(self) -> dict[str, Any]:
        """What the file says, whoever wrote it; nothing where it cannot be read."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            said = json.loads(self.path.read_text(encoding="utf-8"))
            return said if isinstance(said, dict) else {}
        return {}

    def update(self, **values: Any) -> None:
        now = time.time()
        due = values.get("status", self.values["status"]) != self.values["status"] or now - self._written_at >= 1.0
        self.values.update(values, updated_at=now)
        if due or "obeyed" in values:
            self._written_at = now
            self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(strict(self.values), indent=1, allow_nan=False), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:  # a full disk must not end the run; checkpoints have their own rules
            logger.warning("%s cannot be written: %s", self.path, error.strerror)


class Meter:
    """Throughput since the last log: tokens over all ranks, and how long this rank waited for data."""

    def __init__(self) -> None:
        self.epoch_started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps, self.tokens, self.supervised = time.perf_counter(), 0.0, 0, 0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def epoch_seconds(self) -> float:
        return time.perf_counter() - self.epoch_started

    @contextlib.contextmanager
    def paused(self, idle: bool = False) -> Iterator[None]:
        """Leave what happens in this block out of the throughput; the run is `idle`: also out of the epoch's time."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.started += seconds
        self.epoch_started += seconds if idle else 0.0

    def count(self, tokens: int, supervised: int) -> None:
        self.steps, self.tokens, self.supervised = self.steps + 1, self.tokens + tokens, self.supervised + supervised

    def rates(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "train/tokens_per_second": self.tokens / seconds,
            "train/supervised_tokens_per_second": self.supervised / seconds,
            "train/seconds_per_step": seconds / max(self.steps, 1),
            "train/data_wait_share": self.waited / seconds,
        }


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            logger.info(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Alerts(Sink, Protocol):
    """What finds something in the records that it follows, and may want the run to end for it."""

    stopping_for: Any  # what it was, or None

    def start(
        self, records: Sequence[Record], step: int, whole_step: bool, total_steps: int, say: Callable[[str], None]
    ) -> None: ...


class RunRecords:
    """The one place that the loop reports to; every method may be called on every rank and acts on rank 0."""

    def __init__(
        self, save_dir: Path, is_main: bool, flops_per_token: tuple[float, float], device_name: str,
        devices: int, alerts: Alerts, sinks: Sequence[Sink] = (),
    ):  # fmt: skip
        """`flops_per_token`: of an input token, of a supervised token; `sinks` follow the metrics as `alerts` do."""
        self.is_main = is_main
        gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_main and device_name != "cpu" else 0
        self.system = SystemWatch(save_dir, gpus)
        self._paused_at = 0.0
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops(device_name, devices)
        self.metrics = MetricsLog(save_dir / "metrics.jsonl")
        self.alerts = alerts
        self.metrics.sinks += [alerts, *sinks]
        self.state_file = StateFile(save_dir / "state.json")
        self.progress: Progress | None = None
        self.last_eval: dict[str, float] = {}
        self._last_eval_step = -1
        self._position: Callable[[], dict[str, Any]] = dict
        self._began = time.monotonic()

    @contextlib.contextmanager
    def running(self, state: LoopState, plan: Plan) -> Iterator[None]:
        """Cut the records back to the step that the run starts from; say so when the block ends with an error."""
        if self.is_main:
            records = self.metrics.start(state.step, whole_step=not state.unfinished)
            for last in [record for record in records if record["kind"] == "eval"][-1:]:
                self.last_eval = {key: value for key, value in last.items() if key.startswith("eval/")}
                self._last_eval_step = last["step"]
            self.progress = Progress(plan.total_steps, state.step)
            self.alerts.start(records, state.step, not state.unfinished, plan.total_steps, self.progress.line)
            before = self.state_file.read().get("seconds") if state.step else None
            self._began = time.monotonic() - (before if isinstance(before, (int, float)) else 0.0)
            self._position = lambda: {  # asked for whenever something is said, so that it is never an old one
                "step": state.step, "total_steps": plan.total_steps, "epoch": state.epoch,
                "stage": plan.stage_of(min(state.epoch, plan.epochs - 1)), "seconds": self.seconds(),
            }  # fmt: skip
            self.state_file.update(status="running", started_at=time.time(), **self._position())
            self.system.start()
        try:
            yield
        except BaseException:
            self.close("failed")
            raise

    def begin_epoch(self, state: LoopState, plan: Plan) -> None:
        """Announce a stage where one begins."""
        span = plan.span_of(state.epoch)
        if self.is_main and len(plan.spans) > 1 and state.epoch == span.first_epoch and not state.rows:
            stage, number = span.stage, plan.stage_of(state.epoch)
            self.metrics.write("event", state.step + 1, event="stage", stage=number, name=stage.name)
            if self.progress is not None:
                self.progress.line(f"stage {number + 1}/{len(plan.spans)}: {stage.name}. {stage.description}".strip())

    def log_step(self, state: LoopState, plan: Plan, values: dict[str, float], meter: Meter) -> None:
        rates = meter.rates()
        meter.reset()
        if not self.is_main or self.progress is None:
            return
        if self.peak_flops:
            body, head = self.flops_per_token
            done = body * rates["train/tokens_per_second"] + head * rates["train/supervised_tokens_per_second"]
            rates["train/mfu"] = done / self.peak_flops
        eta = (plan.total_steps - state.step) * rates["train/seconds_per_step"]
        epoch_eta = plan.steps_of(state.epoch, state.rows) * rates["train/seconds_per_step"]
        epoch_eta = min(epoch_eta, eta)
        counts: dict[str, float] = {"train/tokens": state.tokens, "train/supervised_tokens": state.supervised_tokens}
        counts |= {"train/epoch": plan.epochs_done(state), "train/overflows": state.overflows}
        times = {"eta_seconds": eta, "epoch_eta_seconds": epoch_eta}
        self.metrics.write("train", state.step, **values, **counts, **rates, **times)
        self.progress.line(
            f"epoch {state.epoch + 1}/{plan.epochs}  step {state.step}/{plan.total_steps}  "
            f"loss {values.get('train/loss', math.nan):.4f}  lr {values['train/learning_rate']:.2e}  "
            f"norm {values['train/grad_norm']:.2f}  {rates['train/tokens_per_second']:,.0f} tokens/s  "
            f"epoch eta {duration(epoch_eta)}  eta {duration(eta)}"
        )

    def log_eval(self, state: LoopState, values: dict[str, float]) -> None:
        self.last_eval, self._last_eval_step = values, state.step
        if self.is_main and self.progress is not None:
            self.metrics.write("eval", state.step, **values)
            words = [f"{name.removeprefix('eval/').replace('_', ' ')} {value:.4f}" for name, value in values.items()]
            self.progress.line(f"held-out data after step {state.step}:  {'  '.join(words)}")

    def log_epoch(
        self, state: LoopState, plan: Plan, values: dict[str, float], meter: Meter, memory_bytes: int
    ) -> None:
        if self.is_main:
            self.metrics.write(
                "epoch", state.step, epoch=state.epoch + 1, stage=plan.stage_of(state.epoch),
                mini_epoch=plan.mini_epoch_of(state.epoch) + 1,
                complete=plan.ends_epoch(state),
                train_loss=values.get("train/loss"), train_accuracy=values.get("train/token_accuracy"),
                val_loss=values.get("eval/loss"), val_accuracy=values.get("eval/token_accuracy"),
                learning_rate=values["train/learning_rate"], time_per_epoch=meter.epoch_seconds(),
                memory_usage=memory_bytes, gpu_utilization=self.system.take_gpu_utilization(),
            )  # fmt: skip

    def event(self, step: int, event: str, **values: Any) -> None:
        if self.is_main:
            self.metrics.write("event", step, event=event, **values)

    def step_done(self) -> None:
        if self.is_main and self.progress is not None:
            self.progress.advance()
            self.state_file.update(**self._position())
            if figures := self.system.take():
                self.metrics.write("system", self._position()["step"], **figures)

    def seconds(self) -> float:
        """How long the run has been running, earlier starts included and what lay between them not."""
        return time.monotonic() - self._began

    def alive(self) -> None:
        """Renew `updated_at` of state.json, by which others tell a slow run, or a paused one, from a stuck one."""
        if self.is_main and self.progress is not None:
            self.state_file.update(**self._position())

    def obeyed(self, what: str, command_id: Any = None) -> None:
        """Say what has become of a command: pausing, paused, running (again) or saved."""
        if not self.is_main:
            return
        step = self._position()["step"]
        now, done = time.monotonic(), {"obeyed": {"id": command_id, "step": step}}
        if what == "paused":
            self._paused_at = now
            self.event(step, "pause")
        elif what == "running":
            self.event(step, "resume", seconds=now - self._paused_at)
        elif what == "saved":
            self.event(step, "save")
        status = self.state_file.values["status"] if what == "saved" else what
        self.state_file.update(status=status, **self._position(), **(done if what != "pausing" else {}))

    def stopping(self, reason: str) -> None:
        """A stop is agreed, what remains is to save."""
        if self.is_main:
            self.event(self._position()["step"], "stop", reason=reason)
            self.status("stopping")

    def status(self, status: str, exit_reason: str | None = None, exit_code: int | None = None) -> None:
        if self.is_main:
            ended = {"exit_reason": exit_reason, "exit_code": exit_code}
            self.state_file.update(
                status=status, **self._position(), **{k: v for k, v in ended.items() if v is not None}
            )

    def metrics_of(self, step: int) -> dict[str, float]:
        """What an evaluation after this step gave, if there was one."""
        return self.last_eval if step == self._last_eval_step else {}

    def close(self, status: str, exit_reason: str | None = None) -> None:
        if exit_reason == ALERT and self.alerts.stopping_for:
            exit_reason = f"{ALERT}: {self.alerts.stopping_for}"
        self.status(status, exit_reason)
        self.system.close()
        if self.is_main:
            self.metrics.close()
            if self.progress is not None:
                self.progress.close()
