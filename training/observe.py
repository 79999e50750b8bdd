"""A run seen from outside, by its files alone: what other programs show of it and how they ask something of it.

The trainer opens no port. Monitor, dashboard and scripts.control read `state.json` and `metrics.jsonl` and write
`control.json`; if they die, training does not notice.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from training.control import COMMANDS, PAUSE, RESUME, SAVE, STOP
from training.metrics import Record, read_records, records_in

UNDER_WAY = ("pending", "running", "pausing", "paused", "stopping")
STALLED_AFTER_SECONDS = 120.0  # the trainer says every second at most and every micro-batch at least that it lives
TAIL_BYTES = 2**18  # of metrics.jsonl, some hundred records
# In which of them a command makes sense.
ACCEPTED_IN = {
    PAUSE: ("running",),
    RESUME: ("paused", "pausing"),
    SAVE: ("running", "paused", "pausing"),
    STOP: ("running", "paused", "pausing"),
}


class WrongStateError(ValueError):
    """A command that the run cannot obey as it is."""


def read_state(run_dir: Path) -> dict[str, Any]:
    """What state.json says, with the `status` as it looks from here: also `crashed` and `stalled`.

    Raises FileNotFoundError where there is no run, ValueError where the file is not one of a run.
    """
    path = run_dir / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the state of a run: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("status"), str):
        raise ValueError(f"{path}: not the state of a run")
    return {**state, "status": seen_status(state, time.time())}


def seen_status(state: dict[str, Any], now: float) -> str:
    """The status of a run at the Unix time `now`: crashed where its process is gone, stalled where it is silent."""
    status = str(state["status"])
    if status not in UNDER_WAY:
        return status
    if state.get("host") == socket.gethostname() and not _lives(state):
        return "crashed"
    if status == "pending":  # data is read and tokenised, of which nothing is heard
        return status
    updated = state.get("updated_at")
    silent = now - updated if isinstance(updated, (int, float)) else 0.0
    return "stalled" if silent > STALLED_AFTER_SECONDS else status


def _lives(state: dict[str, Any]) -> bool:
    """Whether the process of a run on this host is there and no later one with its number."""
    try:
        process = psutil.Process(int(state["pid"]))
        said = state.get("updated_at")
        later = isinstance(said, (int, float)) and process.create_time() > said + 1.0
        return not later and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False


def send_command(run_dir: Path, command: str) -> str:
    """Ask a run for one of COMMANDS through its control.json; returns the id of the request.

    Raises WrongStateError where the run cannot obey it now, and what `read_state` raises.
    """
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is none of {', '.join(COMMANDS)}")
    status = read_state(run_dir)["status"]
    if status not in ACCEPTED_IN[command]:
        wanted = " or ".join(ACCEPTED_IN[command])
        raise WrongStateError(f"{run_dir} is {status}, and {command} needs a run that is {wanted}")
    number = uuid.uuid4().hex[:12]
    temporary = run_dir / f".control.json.{number}.tmp"
    temporary.write_text(json.dumps({"id": number, "command": command}), encoding="utf-8")
    os.replace(temporary, run_dir / "control.json")
    return number


def newest_record(run_dir: Path, kind: str = "train") -> Record:
    """The last record of one kind, from the end of metrics.jsonl; empty where there is none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return {}
    return next((record for record in reversed(records_in(tail)) if record["kind"] == kind), {})


def read_history(run_dir: Path | str, kind: str = "train") -> dict[str, list[Any]]:
    """The records of one kind (train, eval, epoch, system, event) as columns; None where a record lacks one.

    Raises FileNotFoundError where there is no run.
    """
    records = [r for r in read_records(Path(run_dir) / "metrics.jsonl") if r["kind"] == kind]
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names if name != "kind"}


def duration(seconds: float) -> str:
    """A span of time as a person writes it: 45s, 3m20s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
