"""How a run begins: afresh, in the place of another, from a checkpoint of its own, or branching off a foreign one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoints import MANIFEST, TRAINER_STATE, CheckpointStore
from training.files import fsync_path, remove

# Lies there until --overwrite has deleted the run in its way, which a restart by torchrun must not take for its own.
OVERWRITING = ".overwriting"
RUN_FILES = (
    "checkpoints", "final", "best", "report", "wandb", "config.yaml", "state.json", "metrics.jsonl", "alerts.jsonl",
    "data_report.json", "environment.json", "control.json", "rejects.jsonl", "evaluation.json", OVERWRITING,
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    resumes: bool = False  # look for a checkpoint; where none is found the run starts afresh
    checkpoint: Path | None = None  # this one, else the newest good one of the run
    continues: bool = False  # the run in --save_dir goes on; from a checkpoint elsewhere a new one branches off
    clears: bool = False  # what lies in --save_dir is deleted first


def decide_start(save_dir: Path, from_resume: str, overwrite: bool, restarts: int) -> Start:
    """What the flags, the run's directory and the number of restarts by torchrun mean together; changes nothing.

    A directory that holds a run is continued, or emptied when told so, but never written over in silence. Raises
    ValueError naming the ways out.
    """
    steps, final = CheckpointStore(save_dir / "checkpoints").steps(), save_dir / "final"
    if restarts and overwrite and (save_dir / OVERWRITING).exists():  # what lies there is still the other run
        return Start(clears=True)
    if restarts and (steps or from_resume == "0"):  # what the flags said was how the job began, and it has begun
        from_resume, overwrite = "1", False
    if from_resume in ("0", "1"):
        start = Start(resumes=from_resume == "1", continues=from_resume == "1", clears=overwrite)
    else:
        checkpoint = Path(from_resume)
        own = checkpoint.resolve().parent == save_dir.resolve() / "checkpoints"
        start = Start(resumes=True, checkpoint=checkpoint, continues=own)
        traces = [checkpoint / name for name in (MANIFEST, TRAINER_STATE)]  # with one of them it is a damaged one
        if not any(path.is_file() for path in traces):
            inside = CheckpointStore(checkpoint / "checkpoints")
            newest = f"; the newest of that run is {inside.path(inside.steps()[-1])}" if inside.steps() else ""
            raise ValueError(f"--from_resume {from_resume} is no checkpoint{newest}")
    if start.continues and final.exists() and not steps:
        raise ValueError(
            f"--from_resume: {save_dir} holds a result but no checkpoint to continue from. Start a new run on the "
            f"result with --from_weight {final} and another --save_dir, or delete it with --overwrite 1 --from_resume 0"
        )
    if (steps or final.exists()) and not (start.continues or start.clears):
        raise ValueError(
            f"--save_dir {save_dir} already holds a run: continue it with --from_resume 1, choose another directory, "
            "or delete it with --overwrite 1"
        )
    return start


def restarts_by_torchrun() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def announce_clearing(save_dir: Path) -> None:
    """Leave word that the run in the directory is to be deleted; `clear_run` does so when the new one starts."""
    (save_dir / OVERWRITING).touch()
    fsync_path(save_dir)


def clear_run(save_dir: Path) -> None:
    """Delete what a run has written; other files in the directory stay."""
    for name in RUN_FILES:
        remove(save_dir / name)


def refuse_changes(saved: dict[str, Any], current: dict[str, Any], allowed: list[str]) -> list[str]:
    """Names of the things that differ and were allowed to. Raises ValueError with both values of each that was not."""
    changed = [name for name in current if saved.get(name) != current[name]]
    refused = [
        f"{name}: the checkpoint has {saved.get(name)}, this run {current[name]} (--allow_change {name} accepts it)"
        for name in changed
        if name not in allowed
    ]
    if refused:
        raise ValueError("cannot resume, something that decides the result has changed:\n" + "\n".join(refused))
    return changed
