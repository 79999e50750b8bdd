"""A run seen from outside, by its files alone: what other programs show of it and how they ask something of it.

The trainer opens no port. Monitor, dashboard and scripts.control read `state.json` and `metrics.jsonl` and write
`control.json`; if they die, training does not notice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import struct
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from training.control.requests import COMMANDS, MAX_BYTES, PAUSE, RESUME, SAVE, STOP
from training.records.metrics import Record, read_records, records_in

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
REPLACES = {STOP: COMMANDS, PAUSE: (SAVE,), RESUME: (PAUSE,), SAVE: ()}  # a pause saves first
VOID_AFTER_SECONDS = 2.0  # a resume of what runs is never said to be obeyed; by then the trainer has read it


class WrongStateError(ValueError):
    """A command that the run cannot obey as it is."""


@dataclass(frozen=True)
class Request:
    """What control.json asks."""

    id: Any
    command: str
    written_at: float


@dataclass(frozen=True)
class RunState:
    """The state of a run as it looks from here. What state.json does not hold, or not as it should, is None."""

    status: str  # as the trainer says it, or crashed, or stalled
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    stage: int | None = None
    seconds: float | None = None  # that it has been running, over all its starts
    started_at: float | None = None  # Unix time of the last start, of its first step
    updated_at: float | None = None
    pid: int | None = None
    host: str | None = None
    exit_reason: str | None = None
    exit_code: int | None = None
    obeyed: dict[str, Any] | None = None  # {"id", "step"} of the last command that was
    accepts: tuple[str, ...] = ()  # the commands that make sense now

    @property
    def share(self) -> float | None:
        """How much of the run is done."""
        if self.step is None or not self.total_steps:
            return None
        return min(1.0, self.step / self.total_steps)

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()


def checked(said: dict[str, Any]) -> RunState:
    """What a state.json holds, each value only where it is of its type. `status` must be there."""

    def whole(name: str) -> int | None:
        value = said.get(name)
        return value if type(value) is int and 0 <= value < 2**63 else None

    def real(name: str) -> float | None:
        value: Any = said.get(name)
        return float(value) if type(value) in (int, float) and abs(value) < 2**63 else None  # NaN is not, either

    def text(name: str) -> str | None:
        return value if isinstance(value := said.get(name), str) else None

    obeyed = said.get("obeyed")
    return RunState(
        str(said["status"]), whole("step"), whole("total_steps"), whole("epoch"), whole("stage"), real("seconds"),
        real("started_at"), real("updated_at"), whole("pid"), text("host"), text("exit_reason"), whole("exit_code"),
        obeyed if isinstance(obeyed, dict) and type(obeyed.get("step")) is int else None,
    )  # fmt: skip


def run_state(run_dir: Path) -> RunState:
    """What a run is doing and which commands it takes.

    Raises FileNotFoundError where there is no run, ValueError where the file is not one of a run.
    """
    path = run_dir / "state.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the state of a run: {error}") from None
    if not isinstance(said, dict) or not isinstance(said.get("status"), str):
        raise ValueError(f"{path}: not the state of a run")
    state = checked(said)
    state = replace(state, status=seen_status(state, time.time()))
    waiting = pending_request(run_dir, state)
    return replace(state, accepts=tuple(c for c in COMMANDS if refusal(state, waiting, c) is None))


def read_state(run_dir: Path) -> dict[str, Any]:
    """What is known of `run_state` as a dictionary; raises what that raises."""
    return {name: value for name, value in asdict(run_state(run_dir)).items() if value is not None}


def seen_status(state: RunState, now: float) -> str:
    """The status of a run at the Unix time `now`: crashed where its process is gone, stalled where it is silent."""
    if state.status not in UNDER_WAY:
        return state.status
    if state.is_here and not _lives(state):
        return "crashed"
    if state.status == "pending":  # data is read and tokenised, of which nothing is heard
        return state.status
    silent = now - state.updated_at if state.updated_at is not None else 0.0
    return "stalled" if silent > STALLED_AFTER_SECONDS else state.status


def _lives(state: RunState) -> bool:
    """Whether the process of a run on this host is there and no later one with its number."""
    try:
        process = psutil.Process(state.pid or -1)
        later = state.updated_at is not None and process.create_time() > state.updated_at + 1.0
        return not later and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, OverflowError, psutil.Error):
        return False


def is_held(run_dir: Path) -> bool:
    """Whether a process trains into the directory, by the lock that it then has; asked without taking the lock."""
    if not sys.platform.startswith("linux"):
        return (run_dir / ".lock").exists()
    try:
        descriptor = os.open(run_dir / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        question = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
        return bool(struct.unpack("hhqqi0q", answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def read_request(run_dir: Path) -> Request | None:
    """What control.json asks, whoever has been asked; None for what no trainer would obey."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(run_dir / "control.json", flags), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
                said = json.loads(file.read(MAX_BYTES))
                if said["command"] in COMMANDS:
                    return Request(said["id"], said["command"], status.st_mtime)
    return None


def pending_request(run_dir: Path, state: RunState) -> Request | None:
    """What the run has been asked since it began and has not obeyed yet."""
    request = read_request(run_dir)
    if request is None or state.started_at is None or request.written_at < state.started_at - 0.01:  # a coarse clock
        return None
    if state.obeyed is not None and state.obeyed.get("id") == request.id:
        return None
    if request.command == RESUME and state.status == "running":
        heard = (state.updated_at or 0.0) - request.written_at
        return request if heard < VOID_AFTER_SECONDS else None
    return request


def refusal(state: RunState, waiting: Request | None, command: str) -> str | None:
    """Why a run cannot be asked for this now, with `waiting` still to be obeyed; None where it can."""
    undoes = waiting is not None and command == RESUME and waiting.command == PAUSE and state.status == "running"
    if state.status not in ACCEPTED_IN[command] and not undoes:
        return f"is {state.status}, and {command} needs a run that is {' or '.join(ACCEPTED_IN[command])}"
    if waiting is not None and waiting.command != command and waiting.command not in REPLACES[command]:
        return f"has not obeyed {waiting.command} yet; {command} would take its place, ask again when it has"
    return None


@contextlib.contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Among those who send commands to a run."""
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def send_command(run_dir: Path, command: str) -> str:
    """Ask a run for one of COMMANDS through its control.json; returns the id of the request.

    One that the run has not obeyed yet is not lost: what implies it may take its place, the same again is the same
    request, and anything else is refused. Raises WrongStateError where the run cannot obey it now, and what
    `run_state` raises.
    """
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is none of {', '.join(COMMANDS)}")
    with _one_at_a_time(run_dir):
        state = run_state(run_dir)
        waiting = pending_request(run_dir, state)
        if reason := refusal(state, waiting, command):
            raise WrongStateError(f"{run_dir} {reason}")
        if waiting is not None and waiting.command == command:
            return str(waiting.id)
        number = uuid.uuid4().hex[:12]
        temporary = run_dir / f".control.json.{number}.tmp"
        temporary.write_text(json.dumps({"id": number, "command": command}), encoding="utf-8")
        os.replace(temporary, run_dir / "control.json")
    return number


def runs_beside(run_dir: Path) -> str:
    """Where there is no run: that, in words, with the runs that are there."""
    where = run_dir if run_dir.is_dir() else run_dir.parent
    beside = sorted(path.parent.name for path in where.glob("*/state.json")) if where.is_dir() else []
    inside = "it" if where == run_dir else str(where)
    hint = f"; there are runs in {inside}: {', '.join(beside[:8])}" if beside else ""
    return f"{run_dir} is no run: it has no state.json{hint}"


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
