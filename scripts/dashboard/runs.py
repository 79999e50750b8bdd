"""The runs of a directory, read from their files.

Their content is foreign: a file may be a link to somewhere else, endless, no JSON, or hold numbers that JSON has not.
Each is opened below the directory of its run without following links, and read up to a limit.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import psutil

from training.config import Config, make_config
from training.config.flags import ConfigError
from training.config.yaml_files import parse_yaml
from training.control.requests import RESUME, STOP
from training.records.metrics import record_of
from training.records.run_files import UNDER_WAY, RunState, is_held, run_state

MAX_JSON_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_IMAGE_BYTES = 8 << 20
LOG_BYTES = 64 * 1024
SEARCH_BYTES = 256 << 20  # of metrics.jsonl, for its newest evaluation, at the first look
TRACES = ("state.json", "metrics.jsonl", "config.yaml", "launch.json")
LAUNCH = "launch.json"  # who was started from the page: {pid, created, processes, device, time}, `stopped` when told to
SPARK_POINTS = 48
BUSY = (*UNDER_WAY, "stalled")
RESUMABLE = ("stopped", "crashed", "failed")  # and a stalled one that nobody here has
NOT_BEGUN = ("unknown", "pending", "crashed", "failed")  # what a start that is ended before its first step looks like
ENDING_SECONDS = 60.0  # that this takes at most
DISTILLATION = ("-m", "scripts.train_distillation")
TRAINER = ("train_full_sft.py",)


class UnknownRunError(LookupError):
    """There is no such run, or not that file of it."""


def clean(value: Any, depth: int = 0) -> Any:
    """The value as strict JSON can say it: non-finite numbers as null, and nothing nested without end."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, bool, type(None))):
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else None
    if depth > 20:
        return None
    if isinstance(value, dict):
        return {str(clean(str(key))): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, depth + 1) for item in value]
    return str(value)


@contextmanager
def open_inside(run_dir: Path, *names: str) -> Iterator[IO[bytes]]:
    """A regular file of a run; no part of its path below runs_dir may be a link. Raises UnknownRunError."""
    directory = None
    try:
        directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = inner
        descriptor = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except (OSError, ValueError) as error:
        raise UnknownRunError(f"no {'/'.join(names)}") from error
    finally:
        if directory is not None:
            os.close(directory)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UnknownRunError(f"no {'/'.join(names)}")
        yield file


def read_text(run_dir: Path, *names: str, limit: int = MAX_TEXT_BYTES) -> str:
    with open_inside(run_dir, *names) as file:
        return file.read(limit).decode("utf-8", "replace")


def read_json(run_dir: Path, *names: str) -> Any:
    """The content of a JSON file of a run, None where there is none that can be read."""
    with suppress(UnknownRunError, ValueError, RecursionError):
        return clean(json.loads(read_text(run_dir, *names, limit=MAX_JSON_BYTES)))
    return None


class Runs:
    """The direct sub-directories of `runs_dir` that hold a run; a link is none of them."""

    def __init__(self, runs_dir: Path):
        self.dir = runs_dir.resolve()

    def find(self, run_id: str) -> Path:
        """Raises UnknownRunError."""
        path = self.dir / run_id if is_name(run_id) else None
        with suppress(OSError, ValueError):
            if path and path.parent == self.dir and stat.S_ISDIR(path.lstat().st_mode) and _has_traces(path):
                return path
        raise UnknownRunError("no such run")

    def all(self) -> list[Path]:
        """Newest first."""
        found = []
        with suppress(OSError), os.scandir(self.dir) as entries:
            for entry in entries:
                with suppress(OSError, UnknownRunError):
                    path = self.find(entry.name)
                    found.append((max(_changed(path / name) for name in TRACES), path))
        return [path for _, path in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]


def is_name(name: str) -> bool:
    """Whether a text can only be the name of something inside a directory, and of nothing hidden."""
    return bool(name) and len(name.encode("utf-8", "replace")) <= 255 and name[0] != "." and not set(name) & {"/", "\0"}


def _has_traces(path: Path) -> bool:
    return any(_changed(path / name) for name in TRACES)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def launch_of(run_dir: Path) -> dict[str, Any]:
    """What the page has started in this directory last, {} where nothing; `alive` says whether it is there still."""
    launch = read_json(run_dir, LAUNCH)
    if not isinstance(launch, dict):
        return {}
    alive = False
    with suppress(KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        process = psutil.Process(int(launch["pid"]))
        alive = abs(process.create_time() - float(launch["created"])) < 1 and (process.status() != psutil.STATUS_ZOMBIE)
    return {**launch, "alive": alive}


def state_of(run_dir: Path) -> RunState:
    """The state of a run as it looks from here; between a start from the page and the trainer's first word, pending.

    What it accepts is what the page can do: it can also start a run again, and end one that has not begun to train.
    """
    state = RunState("unknown")
    try:
        with open_inside(run_dir, "state.json") as file:  # a regular file, and no link to one of somebody else
            size = os.fstat(file.fileno()).st_size
        if size <= MAX_JSON_BYTES:
            state = run_state(run_dir)
    except (UnknownRunError, FileNotFoundError):
        state = RunState("unknown", updated_at=0.0)
    except (OSError, ValueError):
        state = RunState("unknown", exit_reason="state.json cannot be read", updated_at=time.time())
    launch = launch_of(run_dir)
    if launch and _number(launch.get("time")) > (state.updated_at or 0.0):
        if launch["alive"]:
            state = replace(state, status="pending", exit_reason=None, accepts=())
        elif state.status not in BUSY:
            state = replace(state, status="failed", exit_reason="it ended before it began to train; the log says why")
    told = _number(launch.get("stopped"))
    if told and (state.updated_at or 0.0) < told + ENDING_SECONDS and state.status in NOT_BEGUN:
        status = "stopping" if launch["alive"] else "stopped"
        state = replace(state, status=status, exit_reason="a stop command before it began to train", accepts=())
    accepts = state.accepts
    if is_resumable(run_dir, state) and _changed(run_dir / "config.yaml"):
        accepts = (RESUME,)
    elif state.status == "pending":
        accepts = (STOP,) if launch.get("alive") else ()
    return replace(state, accepts=accepts)


def is_resumable(run_dir: Path, state: RunState) -> bool:
    """Whether a run may be started again: it has ended, or has long been silent and no process trains into it."""
    return state.status in RESUMABLE or (state.status == "stalled" and not is_held(run_dir))


def is_in_the_way(run_dir: Path, state: RunState) -> bool:
    """Whether a run takes devices of this machine; one of another host only where a process here is seen to have it."""
    return state.status in BUSY and (state.is_here or is_held(run_dir))


def state_for_page(run_dir: Path, state: RunState | None = None) -> dict[str, Any]:
    """The state for the page and REST; `state` where it has just been looked at."""
    said: dict[str, Any] = clean(asdict(state or state_of(run_dir)))
    if launch := launch_of(run_dir):
        said["processes"] = launch.get("processes")
    return said


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def last_records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each kind among the last of metrics.jsonl, and the newest evaluation wherever it stands."""
    found: dict[str, dict[str, Any]] = {}
    with suppress(UnknownRunError), open_inside(run_dir, "metrics.jsonl") as file:
        size = os.fstat(file.fileno()).st_size
        begin = max(0, size - LOG_BYTES)
        tail = os.pread(file.fileno(), size - begin, begin)
        for line in tail.split(b"\n"):
            if record := parse_record(line):
                found[record["kind"]] = record
        evaluation = found.get("eval") or _evaluation_before(run_dir, file, begin)
        if evaluation:
            found["eval"] = evaluation
        if len(_evaluations) >= MAX_REMEMBERED:
            _evaluations.clear()
        whole = begin + tail.rfind(b"\n") + 1
        _evaluations[run_dir] = (whole, text_before(file, whole), evaluation)
    return found


# Run -> up to where metrics.jsonl has been searched, what stands before that place, and the newest evaluation there.
_evaluations: dict[Path, tuple[int, bytes, dict[str, Any]]] = {}
MAX_REMEMBERED = 1000


def text_before(file: IO[bytes], place: int) -> bytes:
    begin = max(0, place - 512)
    return os.pread(file.fileno(), place - begin, begin)


def _evaluation_before(run_dir: Path, file: IO[bytes], end: int) -> dict[str, Any]:
    """The newest evaluation before a place; no further back than was searched already, as long as that still stands."""
    begin, known = max(0, end - SEARCH_BYTES), {}
    if run_dir in _evaluations:
        searched, text, record = _evaluations[run_dir]
        if text_before(file, searched) == text:
            begin, known = min(searched, end), record
    return last_of_kind(file, "eval", begin, end) or known


def last_of_kind(file: IO[bytes], kind: str, begin: int, end: int) -> dict[str, Any]:
    """The last record of a kind between two places, searched for from the end."""
    mark, rest = f'"{kind}"'.encode(), b""
    while end > begin:
        size = min(MAX_JSON_BYTES, end - begin)
        end -= size
        data = os.pread(file.fileno(), size, end) + rest
        cut = data.find(b"\n") + 1 if end > begin else 0
        rest = data[: cut or len(data)] if end > begin else b""  # its beginning is in the chunk before
        rest = rest if len(rest) <= MAX_JSON_BYTES else b""
        place = len(data)
        while (hit := data.rfind(mark, cut, place)) >= 0:
            place = max(cut, data.rfind(b"\n", 0, hit) + 1)
            record = parse_record(data[place:].split(b"\n", 1)[0])
            if record and record["kind"] == kind:
                return record
    return {}


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A record of metrics.jsonl; what is none, or too long for one, is nothing."""
    return record_of(line) if len(line) <= MAX_JSON_BYTES else None


def sparkline(run_dir: Path) -> list[list[float]]:
    """A few (step, loss) from all over metrics.jsonl, without reading the whole of it."""
    points: dict[int, float] = {}
    with suppress(UnknownRunError), open_inside(run_dir, "metrics.jsonl") as file:
        for record in sample_records(file, SPARK_POINTS):
            loss = record.get("train/loss")
            if isinstance(loss, float) and math.isfinite(loss):
                points[record["step"]] = loss
    steps = sorted(points)
    stride = max(1, len(steps) // SPARK_POINTS)
    kept = [step for place, step in enumerate(steps) if place % stride == 0 or step == steps[-1]]
    return [[step, points[step]] for step in kept]


def sample_records(file: IO[bytes], count: int) -> Iterator[dict[str, Any]]:
    """Records of a small file, or those found at `count` places of a large one."""
    size, block = os.fstat(file.fileno()).st_size, 4096
    if size <= 4 * count * 1024:
        file.seek(0)
        places = [(0, file.read(size))]
    else:
        places = []
        for number in range(count):
            place = int((size - block) * number / (count - 1))
            file.seek(place)
            places.append((place, file.read(block)))
    for place, data in places:
        lines = data.split(b"\n")
        whole = lines[1 if place else 0 :] if len(places) == 1 else lines[1 if place else 0 :][:1]
        yield from filter(None, map(parse_record, whole))


def summary(run_dir: Path) -> dict[str, Any]:
    """What a list of runs shows of one."""
    return {**progress(run_dir), "sparkline": sparkline(run_dir)}


def progress(run_dir: Path) -> dict[str, Any]:
    """Where a run stands, in numbers."""
    return _progress(run_dir, state_of(run_dir), last_records(run_dir))


def _progress(run_dir: Path, state: RunState, last: dict[str, dict[str, Any]]) -> dict[str, Any]:
    train, evaluation = last.get("train", {}), last.get("eval", {})
    running = state.status in ("running", "pausing", "paused")
    found = {
        "id": run_dir.name,
        "status": state.status,
        "exit_reason": state.exit_reason,
        "step": state.step,
        "total_steps": state.total_steps,
        "share": state.share,
        "epoch": state.epoch,
        "stage": state.stage,
        "elapsed_seconds": elapsed_seconds(state),
        "eta_seconds": train.get("eta_seconds") if running else None,
        "train_loss": train.get("train/loss"),
        "eval_loss": evaluation.get("eval/loss"),
        "learning_rate": train.get("train/learning_rate"),
        "started_at": state.started_at,
        "updated_at": state.updated_at,
        "accepts": state.accepts,
    }
    return {name: clean(value) for name, value in found.items()}


def elapsed_seconds(state: RunState) -> float | None:
    """How long a run has been running over all its starts; one that does not say so, since its last one."""
    if state.seconds is not None:
        return state.seconds
    if not state.started_at or state.updated_at is None:
        return None
    return max(0.0, state.updated_at - state.started_at)


def details(run_dir: Path) -> dict[str, Any]:
    """All that is known of a run but its series."""
    state, last = state_of(run_dir), last_records(run_dir)
    return {
        **_progress(run_dir, state, last),
        "state": state_for_page(run_dir, state),
        "last": clean(last),
        "environment": read_json(run_dir, "environment.json"),
        "data_report": read_json(run_dir, "data_report.json"),
        "checkpoints": checkpoints(run_dir),
        "has_config": _changed(run_dir / "config.yaml") > 0,
        "has_report": bool(report(run_dir)),
    }


def checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    with suppress(OSError), os.scandir(run_dir / "checkpoints") as entries:
        for entry in entries:
            number = entry.name.removeprefix("step-")
            if entry.name.startswith("step-") and number.isdigit() and entry.is_dir(follow_symlinks=False):
                found.append({"step": int(number), "time": entry.stat(follow_symlinks=False).st_mtime})
    return sorted(found, key=lambda each: each["step"])


def report(run_dir: Path) -> dict[str, Any]:
    """The report of a run as Markdown with the names of its images, {} where there is none."""
    try:
        text = read_text(run_dir, "report", "report.md")
    except UnknownRunError:
        return {}
    images = []
    with suppress(OSError), os.scandir(run_dir / "report") as entries:
        images = sorted(e.name for e in entries if is_image(e.name) and e.is_file(follow_symlinks=False))
    return {"markdown": text, "images": images}


def is_image(name: str) -> bool:
    return is_name(name) and name.endswith(".png")


def read_image(run_dir: Path, name: str) -> bytes:
    """Raises UnknownRunError for what is no PNG of the report."""
    if is_image(name):
        with open_inside(run_dir, "report", name) as file:
            content = file.read(MAX_IMAGE_BYTES)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return content
    raise UnknownRunError("no such image")


def read_log(run_dir: Path, since: int | None) -> dict[str, Any]:
    """What log.txt holds from the byte `since` on, or its last part; `reset` where it has become shorter than that."""
    try:
        with open_inside(run_dir, "log.txt") as file:
            size = os.fstat(file.fileno()).st_size
            reset = since is not None and since > size
            begin = max(0, size - LOG_BYTES) if since is None or reset or since < size - LOG_BYTES else since
            file.seek(begin)
            data = file.read(LOG_BYTES)
    except UnknownRunError:
        return {"text": "", "position": 0, "reset": bool(since), "skipped": False}
    skipped = since is not None and not reset and begin > since
    text = data.decode("utf-8", "replace")
    return {"text": text, "position": begin + len(data), "reset": reset or skipped, "skipped": begin > 0 and skipped}


def read_config(run_dir: Path) -> dict[str, Any]:
    """The flags of a run and a command that starts the like of it. Raises UnknownRunError before it has any."""
    text = read_text(run_dir, "config.yaml")
    try:
        values = parse_yaml(text, "config.yaml")
    except ConfigError:
        values = {}
    values = values if isinstance(values, dict) else {}
    processes = processes_of(run_dir)
    return {"yaml": text, "values": clean(values), "processes": processes, "command": command_of(values, processes)}


def command_of(values: dict[str, Any], processes: int) -> str:
    """The torchrun line of these flags, those at their default left out."""
    words = ["torchrun", "--standalone", f"--nproc_per_node={processes}", *program_of(values)]
    with suppress(ConfigError):
        defaults, config = asdict(Config()), asdict(make_config(values))
        always = ("data_path", "save_dir")
        words += as_flags({n: v for n, v in config.items() if v is not None and (v != defaults[n] or n in always)})
    return shlex.join(words)


def program_of(values: dict[str, Any]) -> tuple[str, ...]:
    """What torchrun starts for these flags."""
    return DISTILLATION if values.get("teacher") else TRAINER


def as_flags(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items()]


def threads_of(run_dir: Path) -> int | None:
    """How many threads each process of a run had, on which the last bits of its numbers depend."""
    environment = read_json(run_dir, "environment.json")
    number = environment.get("threads_per_process") if isinstance(environment, dict) else None
    return number if type(number) is int and 1 <= number <= 1024 else None


def processes_of(run_dir: Path) -> int:
    """How many processes a run had last."""
    environment = read_json(run_dir, "environment.json")
    for source, key in ((launch_of(run_dir), "processes"), (environment, "world_size")):
        number = source.get(key) if isinstance(source, dict) else None
        if isinstance(number, int) and 1 <= number <= 1024:
            return number
    return 1
