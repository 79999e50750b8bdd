"""How a run begins: afresh, in the place of another, from a checkpoint of its own, or branching off a foreign one."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.checkpoints.manifest import MANIFEST, TRAINER_STATE
from training.checkpoints.store import CheckpointStore
from training.config import Config
from training.disk import remove, replace_json

logger = logging.getLogger("train")

JOB = ".job"  # says which job of torchrun has begun to train into the directory
RUN_FILES = (
    "checkpoints", "final", "best", "report", "wandb", "tensorboard", "config.yaml", "state.json", "metrics.jsonl",
    "alerts.jsonl", "data_report.json", "environment.json", "control.json", "rejects.jsonl", "evaluation.json",
    "export-step-*", "model-*.gguf", "aside-metrics.jsonl", "aside-alerts.jsonl", JOB,
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    resumes: bool = False  # look for a checkpoint; where none is found the run starts afresh
    checkpoint: Path | None = None  # this one, else the newest good one of the run
    continues: bool = False  # the run in --save_dir goes on; from a checkpoint elsewhere a new one branches off
    clears: bool = False  # what lies in --save_dir is deleted first


def decide_start(save_dir: Path, from_resume: str, overwrite: bool, begun: bool) -> Start:
    """What the flags and the run's directory mean together; changes nothing.

    `begun`: this job has begun to train there already and torchrun has started it again; what its flags say was how it
    began. A directory that holds a run is continued, or emptied when told so, but never written over in silence.
    Raises ValueError naming the ways out.
    """
    if begun:
        return Start(resumes=True, continues=True)
    steps, final = CheckpointStore(save_dir / "checkpoints").steps(), save_dir / "final"
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


def refuse_to_clear(save_dir: Path, sources: dict[str, str | None]) -> None:
    """Raises ValueError where what --overwrite would delete is what the run is made of; `sources`: by their flags."""
    doomed = {path.resolve() for pattern in RUN_FILES for path in save_dir.glob(pattern)}
    for name, source in sources.items():
        place = Path(source or "").resolve()
        if source and doomed & {place, *place.parents, place / "final"}:  # a run stands for its final/
            raise ValueError(
                f"--overwrite 1 would delete --{name} {source}, which the run needs: choose another --save_dir"
            )


def job_name() -> str:
    """The same for all that one torchrun starts, again and again, and for nothing else."""
    name, launcher = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.getppid()
    if name != "none":
        return name
    born = "?"
    with suppress(OSError):
        born = Path(f"/proc/{launcher}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{socket.gethostname()} {launcher} {born}"


def has_begun(save_dir: Path) -> bool:
    """Whether torchrun has started this job again after it had begun to train into the directory."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return bool(json.loads((save_dir / JOB).read_text(encoding="utf-8"))["name"] == job_name())
    return False


def begin(save_dir: Path, clears: bool) -> None:
    """Delete what another run has written, where that is wished (other files stay), and take the directory over."""
    for pattern in RUN_FILES if clears else ():
        for path in sorted(save_dir.glob(pattern)):
            remove(path)
    try:
        replace_json(save_dir / JOB, {"name": job_name()})
    except OSError as error:  # a restart would then do what the flags say
        logger.warning("the run goes on without a note of its job: %s", error)


def with_day(
    config: Config, start: Start, day_of: Callable[[str | None], str | None], say: Callable[[str], None]
) -> Config:
    """The configuration with the day that its chat template writes, the same for all of a run, or with none.

    It is what the flag says, else that of the run that is resumed, else today. `day_of(named)` knows the template: it
    gives `named` or today, or None where no day is written.
    """
    recorded = _recorded_day(Path(config.save_dir), start) if start.resumes else None
    day = day_of(config.template_date or recorded)
    if day:
        say(f"the chat template writes the date: {day} in all samples (--template_date names another)")
    elif config.template_date:
        say(f"--template_date {config.template_date} does nothing: the chat template writes no date")
    return replace(config, template_date=day)


def _recorded_day(save_dir: Path, start: Start) -> str | None:
    """The day in the checkpoint to go on from, read before its weights are checked; older versions recorded none."""
    store = CheckpointStore(save_dir / "checkpoints")
    own = [store.path(step) for step in reversed(store.steps())]
    for checkpoint in [start.checkpoint] if start.checkpoint else own:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
            day = state["config"].get("template_date")
            return None if day is None else str(day)
    return None


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
