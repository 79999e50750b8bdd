"""Forked processes under strace: what they ask of the system is written down, refused, or the last thing they do.

A child waits until strace has attached to it, so a case costs neither an interpreter nor an import. strace counts the
calls of each thread by name, hence a point of a run is a name and a number: the fifth fsync.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.verify.ranks import FORKS
from tests.faults.savers import run_when_told

# A question mark before a name: some machines lack the call.
CHANGING = (
    "openat", "creat", "write", "writev", "pwrite64", "fsync", "fdatasync", "ftruncate", "truncate", "fallocate",
    "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
)  # fmt: skip
TRACED = ",".join(f"?{name}" for name in CHANGING)


@dataclass(frozen=True)
class Call:
    """One system call of a log; `number` counts the calls of that name in its thread, from 1."""

    thread: int
    name: str
    number: int
    arguments: str
    result: str

    @property
    def changes_files(self) -> bool:
        if self.name == "openat":
            return "O_CREAT" in self.arguments
        return not (self.name.startswith("write") and re.match(r"\d+<(pipe|socket|UNIX|/dev/)", self.arguments))

    @property
    def point(self) -> tuple[str, int]:
        return self.name, self.number


def read_log(path: Path) -> list[Call]:
    """The calls of a log in the order in which they began, but what forces to the disk has done so when it ends."""
    calls: list[Call] = []
    numbers: Counter[tuple[str, str]] = Counter()
    unfinished: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if resumed := re.match(r"(\d+) +<\.\.\. \w+ resumed>(.*)", line):
            index = unfinished.pop(resumed[1], None)
            if index is not None:  # it was under way when strace came
                began = calls[index]
                rest, _, result = resumed[2].rpartition(" = ")
                arguments = began.arguments + rest.rstrip(" )")
                calls[index] = Call(began.thread, began.name, began.number, arguments, result)
                if began.name in ("fsync", "fdatasync"):
                    calls.append(calls[index])
                    calls[index] = replace(began, result="?")
        elif begun := re.match(r"(\d+) +(\w+)\((.*)", line):
            thread, name, rest = begun.groups()
            arguments, _, result = rest.rpartition(" = ")
            if rest.endswith("<unfinished ...>"):
                unfinished[thread] = len(calls)
                arguments, result = rest.removesuffix("<unfinished ...>").rstrip(), "?"
            numbers[thread, name] += 1
            calls.append(Call(int(thread), name, numbers[thread, name], arguments.rstrip().removesuffix(")"), result))
    return calls


def points_of(calls: list[Call]) -> list[tuple[str, int]]:
    """Every point at which files change, once."""
    return list(dict.fromkeys(call.point for call in calls if call.changes_files))


class Child:
    """A forked process that runs `target(connection, *args)` once it is told to go on."""

    def __init__(self, target: Callable[..., None], *args: Any):
        self.connection, other = FORKS.Pipe()
        self.process = FORKS.Process(target=run_when_told, args=(other, target, args))
        self.process.start()
        other.close()
        self.connection.recv()  # it is there

    def go(self) -> None:
        self.connection.send(None)

    def heard(self) -> list[Any]:
        """What the child has said until it ended."""
        said = []
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                said.append(self.connection.recv())
        self.process.join()
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def straced(children: list[Child], log: Path, *options: str) -> Iterator[None]:
    """strace the children in this block, with the options; their calls are in `log` afterwards."""
    processes = [word for child in children for word in ("-p", str(child.process.pid))]
    command = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={TRACED}", *options, *processes]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in children:
            said = tracer.stderr.readline()
            assert "attached" in said, said + tracer.stderr.read()
        yield
    finally:
        tracer.send_signal(signal.SIGTERM)  # it lets go of the children first
        tracer.communicate()


@functools.cache
def why_not() -> str:
    """Why strace cannot attach to a process here; nothing where it can."""
    if not shutil.which("strace"):
        return "there is no strace; on Debian and Ubuntu: apt-get install strace"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            tracer = subprocess.Popen(["strace", "-p", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
            said = tracer.stderr.readline()
            tracer.terminate()
            tracer.communicate()
        finally:
            sleeper.kill()
    return "" if "attached" in said else f"strace may not attach to processes here: {said.strip()}"


@pytest.fixture
def strace() -> None:
    """For tests that need it; they are skipped where it cannot run."""
    if why_not():
        pytest.skip(why_not())
