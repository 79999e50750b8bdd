"""Starting runs: the same torchrun line that a user would type, as a list of words and never through a shell.

A run is its own session with its output in RUN/log.txt, so it outlives the server. launch.json in its directory says
who was started, for this server and the ones after it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from scripts.dashboard.runs import (
    BUSY,
    LAUNCH,
    RESUMABLE,
    Runs,
    UnknownRunError,
    as_flags,
    is_in_the_way,
    is_resumable,
    launch_of,
    processes_of,
    program_of,
    read_config,
    state_of,
    threads_of,
)
from scripts.dashboard.system import read_gpus
from training.config.config import field_types, make_config
from training.config.flags import ConfigError
from training.disk import replace_json
from training.records.run_files import UNDER_WAY, WrongStateError, is_held

ROOT = Path(__file__).resolve().parent.parent.parent
NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_PROCESSES = 64
ENDING_SECONDS = 20.0
FLAG = re.compile(r"--(\w+)")

Launcher = Callable[[int, list[str]], list[str]]


class BusyError(RuntimeError):
    """The devices are taken, or the run is in a state in which it cannot be started."""


class FlagError(ValueError):
    """What is wrong with the flags: flag name -> problems."""

    def __init__(self, errors: dict[str, list[str]]):
        super().__init__("; ".join(problem for problems in errors.values() for problem in problems))
        self.errors = errors


def torchrun(processes: int, words: list[str]) -> list[str]:
    """The command of a run, a program and its flags: torchrun of the Python that runs this server."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *words]


def by_flag(problems: list[str]) -> dict[str, list[str]]:
    """Problems under the first flag that each names, '' for none."""
    errors: dict[str, list[str]] = {}
    for problem in problems:
        found = FLAG.search(problem)
        errors.setdefault(found.group(1) if found else "", []).append(problem)
    return errors


class Jobs:
    """Starts runs into a directory, one at a time on the same devices."""

    def __init__(self, runs: Runs, launcher: Launcher = torchrun):
        self.runs, self.launcher = runs, launcher
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, body: dict[str, Any]) -> str:
        """Start a new run; returns its id. Raises FlagError, BusyError."""
        values = {name: value for name, value in body.items() if value is not None and value != ""}
        processes, errors = _processes(values.pop("processes", 1))
        run_dir = None
        try:
            config = make_config(values)
        except ConfigError as error:
            errors |= by_flag(error.problems)
        else:
            run_dir, wrong = self._place(config.save_dir, config.overwrite or config.from_resume != "0")
            errors |= wrong
            zeros = [n for n in values if "\0" in str(getattr(config, n))]
            errors |= {name: [f"--{name}: a text has no zero bytes"] for name in zeros}
        if errors or run_dir is None:
            raise FlagError(errors)
        given = {name: getattr(config, name) for name in values if getattr(config, name) is not None}
        words = [*program_of(given), *as_flags({**given, "save_dir": str(run_dir)})]
        self._launch(run_dir, processes, words, config.device)
        return run_dir.name

    def resume(self, run_dir: Path, processes: int | None = None) -> None:
        """Start a run again that has ended before its time. Raises BusyError, UnknownRunError where it never began."""
        state = state_of(run_dir)
        if not is_resumable(run_dir, state):
            raise BusyError(f"the run is {state.status}, and resume needs one that is paused, {', '.join(RESUMABLE)}")
        try:
            values = read_config(run_dir)["values"]
        except UnknownRunError:
            raise BusyError("the run has not come far enough to be resumed: start it again") from None
        flags = [f"--config={run_dir / 'config.yaml'}", "--from_resume=1", f"--save_dir={run_dir}"]
        device, threads = str(values.get("device", "auto")), threads_of(run_dir)
        self._launch(run_dir, processes or processes_of(run_dir), [*program_of(values), *flags], device, threads)

    def stop_pending(self, run_dir: Path) -> None:
        """End a run that has been started from here and does not train yet. Raises WrongStateError."""
        with self.lock:
            launch = launch_of(run_dir)
            if not launch.get("alive"):
                raise WrongStateError(f"{run_dir} is pending and was not started from here: it cannot be stopped yet")
            if launch.get("stopped"):
                return  # a second signal would keep torchrun from ending its processes
            replace_json(run_dir / LAUNCH, {**launch, "stopped": time.time()})
            with suppress(ProcessLookupError):
                os.killpg(int(launch["pid"]), signal.SIGTERM)  # it leads its own session

    def reap(self) -> None:
        """Take note of children that have ended, or they stay as zombies."""
        self.children = [child for child in self.children if child.poll() is None]

    def _place(self, save_dir: str, goes_on: bool) -> tuple[Path | None, dict[str, list[str]]]:
        """The directory of a new run, which is directly in that of the runs, or what is wrong with it."""
        path = Path(os.path.normpath(ROOT / save_dir))
        if "\0" in save_dir or path.parent.resolve() != self.runs.dir or not NEW_NAME.fullmatch(path.name):
            wrong = f"--save_dir {save_dir}: name a directory in {self.runs.dir}, of letters, digits, dots and dashes"
            return None, {"save_dir": [wrong]}
        path = self.runs.dir / path.name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return None, {"save_dir": [f"--save_dir {save_dir}: is no directory"]}
        if path.exists() and any(path.iterdir()) and not goes_on:
            return None, {"save_dir": [f"--save_dir {save_dir}: is taken; choose another name, or --overwrite 1"]}
        return path, {}

    def _wait_for(self, run_dir: Path, devices: str) -> None:
        """Until the devices are free, which takes a moment after a run has said that it ended. Raises BusyError."""
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            self.reap()
            ending = False
            for other in self.runs.all():
                state, alive = state_of(other), launch_of(other).get("alive", False)
                busy = is_in_the_way(other, state)
                if other == run_dir:  # its files are wanted, wherever it trains
                    busy = state.status in UNDER_WAY or is_held(other)
                if (busy or alive) and (other == run_dir or devices_of(other) == devices):
                    if state.status in BUSY or time.monotonic() > deadline:
                        raise BusyError(
                            f"{other.name} is {state.status} on the same devices ({devices}): stop it first"
                        )
                    ending = True
            if not ending:
                return
            time.sleep(0.1)

    def _launch(self, run_dir: Path, processes: int, words: list[str], device: str, threads: int | None = None) -> None:
        with self.lock:
            self._wait_for(run_dir, device_set(device))
            run_dir.mkdir(exist_ok=True)
            command = self.launcher(processes, words)
            log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with os.fdopen(os.open(run_dir / "log.txt", log_flags, 0o644), "ab") as log:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=_environment(processes, threads), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
            self.children.append(child)
            created = 0.0
            with suppress(psutil.Error):
                created = psutil.Process(child.pid).create_time()
            note = {"pid": child.pid, "created": created, "processes": processes, "device": device}
            replace_json(run_dir / LAUNCH, {**note, "time": time.time(), "command": command})


def device_set(device: str) -> str:
    """A name of the devices that a run takes: two runs under the same name would be in each other's way."""
    if device == "cpu" or (device == "auto" and not read_gpus()):
        return "cpu"
    return f"cuda {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


def devices_of(run_dir: Path) -> str:
    device = "auto"
    with suppress(UnknownRunError):
        device = str(read_config(run_dir)["values"].get("device", "auto"))
    launch = launch_of(run_dir)
    return device_set(str(launch.get("device", device)) if device == "auto" else device)


def _processes(value: Any) -> tuple[int, dict[str, list[str]]]:
    text = str(value).strip()
    if isinstance(value, (int, str)) and not isinstance(value, bool) and text.isascii() and text.isdigit():
        number = int(text[:9])
        if 1 <= number <= MAX_PROCESSES:
            return number, {}
    return 1, {"processes": [f"processes {text[:40]}: a whole number from 1 to {MAX_PROCESSES}"]}


def _environment(processes: int, threads: int | None) -> dict[str, str]:
    """That of the server, with the cores shared out among the processes; `threads`: as many as the run had before."""
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    before = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    given = {"OMP_NUM_THREADS": share, "TOKENIZERS_PARALLELISM": "false", **os.environ, **before}
    return {**given, "PYTHONUNBUFFERED": "1"}


def flag_table() -> dict[str, Any]:
    """All flags for a form: their help, kind, default, choices and bounds, in order; and those of the demo."""
    import dataclasses

    from training.config import Config
    from training.config.command_line import DEMO_CONFIG
    from training.config.yaml_files import read_yaml

    flags = []
    for name, (kind, optional) in field_types().items():
        field = next(f for f in dataclasses.fields(Config) if f.name == name)
        meta = field.metadata
        bounds = {key: meta[key] for key in ("minimum", "maximum", "above") if meta[key] is not None}
        flags.append({
            "name": name, "group": meta["group"], "help": meta["help"], "kind": kind.__name__, "optional": optional,
            "default": field.default, "choices": list(meta["choices"]), **bounds,
        })  # fmt: skip
    demo = {n: v for n, v in read_yaml(str(ROOT / DEMO_CONFIG)).items() if n != "save_dir"}
    return {"flags": flags, "demo": demo, "max_processes": MAX_PROCESSES}
