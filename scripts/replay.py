"""Writes the metrics of a run that has ended into TensorBoard or wandb:   python -m scripts.replay RUN --to tensorboard

The curves become those of metrics.jsonl, whatever was there before. `tensorboard --logdir RUN` then shows them, and
`wandb sync RUN/wandb/offline-run-*` sends them where `WANDB_MODE=offline` was set.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path

from training.checkpoints.checkpointer import read_trainer_state
from training.checkpoints.manifest import CheckpointError
from training.checkpoints.store import CheckpointStore
from training.records.metrics import Sink, read_records
from training.records.run_files import UNDER_WAY, read_state
from training.records.sinks import EVENT_FILES, TENSORBOARD, WANDB, TensorBoardSink, WandbSink


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.replay", description=__doc__.split(":")[0] + ".", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run (--save_dir)")
    parser.add_argument("--to", required=True, choices=(TENSORBOARD, WANDB))
    parser.add_argument("--wandb_project", default="full-sft", help="project name in wandb (default full-sft)")
    return parser.parse_args(argv)


def wandb_id_of(run: Path) -> str:
    """The id under which the run reported, or a new one."""
    store = CheckpointStore(run / "checkpoints")
    try:
        return str(read_trainer_state(store.path(store.steps()[-1]))["wandb_id"])
    except (IndexError, KeyError, CheckpointError):
        return uuid.uuid4().hex[:12]


def replay(run: Path, to: str, wandb_project: str) -> int:
    """Write all records; returns how many. ValueError for a run that is still writing, or has no records."""
    if (run / "state.json").exists() and (status := read_state(run)["status"]) in UNDER_WAY:
        raise ValueError(f"{run} is {status}: it has sinks of its own (--report_to), replay it when it has ended")
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise ValueError(f"{run}/metrics.jsonl holds no records")
    sink: Sink
    if to == TENSORBOARD:
        for path in (run / TENSORBOARD).glob(EVENT_FILES):
            path.unlink()
        sink = TensorBoardSink(run / TENSORBOARD, records)
    else:
        config = {"replayed_from": str(run)}
        sink = WandbSink(wandb_project, wandb_id_of(run), run, config, records)
    sink.close()
    return len(records)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        count = replay(options.run, options.to, options.wandb_project)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 74
    print(f"{count} records are in {options.run / options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
