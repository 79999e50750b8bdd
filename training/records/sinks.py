"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, a function of whoever calls the trainer.

metrics.jsonl is the truth and cut back when a run goes on. A sink is made after that cut and is given what was kept, so
that its curve is that of the file whatever a crash has torn off it, and goes on without a step twice. Both packages are
imported when they are wanted, not before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from training.config import Config
from training.records.metrics import Record, Sink

TENSORBOARD, WANDB = "tensorboard", "wandb"
EVENT_FILES = "events.out.tfevents.*"
OWN_KEYS = ("step", "time", "kind", "event", "non_finite")
REPLACED = "replaced-"


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record that make curves, under the keys that they have there; those of an epoch as epoch/…"""
    prefix = "epoch/" if record["kind"] == "epoch" else ""
    numbers = {
        name: value for name, value in record.items() if isinstance(value, (int, float)) and name not in OWN_KEYS
    }
    return {prefix + name: float(value) for name, value in numbers.items() if prefix or "/" in name}


def text_of(record: Record) -> str:
    """What an event says, a line for each value."""
    values = {name: value for name, value in record.items() if name not in OWN_KEYS}
    lines = (f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())
    return "\n\n".join(lines) or record["event"]


class FunctionSink:
    """A function that is called with each record, those of epochs among them (`record["kind"] == "epoch"`)."""

    def __init__(self, function: Callable[[Record], None]):
        self.log = function

    def close(self) -> None:
        pass


def wait_for_another_second(taken: Iterable[float]) -> None:
    """Both programs name what a start writes by its second, and read it in the order of names."""
    time.sleep(min(1.0, max(0.0, max(taken, default=0) + 1 - time.time())))


class TensorBoardSink:
    """Event files; events of the run are texts there."""

    def __init__(self, directory: Path, history: Sequence[Record] = (), whole: bool = False):
        """Goes on after `history`; `whole`, or where there are no event files yet: begins with all of it."""
        from torch.utils.tensorboard import SummaryWriter

        whole = whole or not history or not any(directory.glob(EVENT_FILES))
        # The last step of the history is written again: what was cut off may have been of the same step.
        first = 0 if whole else history[-1]["step"]
        wait_for_another_second(int(path.name.split(".")[3]) for path in directory.glob(EVENT_FILES))
        self.writer = SummaryWriter(str(directory), purge_step=first)
        for record in history:
            if record["step"] >= first:
                self._add(record)
        self.writer.flush()

    def log(self, record: Record) -> None:
        self._add(record)
        self.writer.flush()  # kill -9 takes nothing that metrics.jsonl has

    def _add(self, record: Record) -> None:
        place = {"global_step": record["step"], "walltime": record["time"]}
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, **place)
        if record["kind"] == "event":
            self.writer.add_text(f"event/{record['event']}", text_of(record), **place)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Weights & Biases; the id is ours and comes back on resume. Only numbers go there, no text of a sample.

    Offline mode does not know of earlier parts of a run: the newest part then holds all of it, and the ones before are
    renamed, so that `wandb sync` sends one. On a server what it has is left alone.
    """

    def __init__(
        self, project: str, run_id: str, directory: Path, config: dict[str, Any], history: Sequence[Record] = ()
    ):
        import wandb

        earlier = list((directory / "wandb").glob(f"offline-run-*-{run_id}"))
        begun = (time.strptime(part.name.split("-")[2], "%Y%m%d_%H%M%S") for part in earlier)
        wait_for_another_second(map(time.mktime, begun))
        self.run = wandb.init(
            project=project, id=run_id, name=directory.name, resume="allow", dir=str(directory), config=config,
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
        for part in earlier if self.run.offline else ():
            os.replace(part, part.with_name(REPLACED + part.name))
        self.first_step = self.run.starting_step if self.run.resumed else 0
        for record in history:
            self.log(record)

    def log(self, record: Record) -> None:
        if record["step"] >= self.first_step and (numbers := scalars(record)):
            self.run.log(numbers, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def sink_makers(
    config: Config, wandb_id: str, callbacks: Sequence[Any] = ()
) -> list[Callable[[Sequence[Record]], Sink]]:
    """What makes the sinks of a run from the records that it goes on from; a callback is a function or a sink."""

    def make_callback(callback: Any, _history: Sequence[Record]) -> Any:
        return FunctionSink(callback) if callable(callback) else callback

    save_dir = Path(config.save_dir)
    makers: dict[str, Callable[[Sequence[Record]], Sink]] = {
        TENSORBOARD: partial(TensorBoardSink, save_dir / TENSORBOARD),
        WANDB: partial(WandbSink, config.wandb_project, wandb_id, save_dir, asdict(config)),
    }
    return [*(makers[name] for name in config.reporters), *(partial(make_callback, each) for each in callbacks)]
