"""metrics.jsonl, the truth about a run, and how the sinks of training/records/sinks.py follow it.

A sink that fails is reported once and dropped: training never dies of its reporting.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from training.disk import fsync_path

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def strict(record: Record) -> Record:
    """The record with non-finite floats as null plus a list of their keys: strict JSON has no NaN."""
    bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**record, **dict.fromkeys(bad), "non_finite": bad} if bad else record


class Sink(Protocol):
    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl: one record per line, appended; `start` cuts it back to the step that a run resumes at."""

    def __init__(self, path: Path):
        self.path = path
        self.sinks: list[Sink] = []
        self._makers: list[Callable[[Sequence[Record]], Sink]] = []
        self._waiting = b""  # lines that the disk had no room for
        self._end: int | None = None  # where they belong in the file, behind which there may be a part of them

    def follow(self, makers: Iterable[Callable[[Sequence[Record]], Sink]]) -> None:
        """Add what `start` will make sinks of, from the records that it keeps."""
        self._makers += makers

    def start(self, step: int, whole_step: bool = True) -> list[Record]:
        """Keep the records up to `step`, so that no step stands twice after a resume; from step 0 on, none.

        Returns what is kept.

        Unless the `whole_step` was finished, of its records only the one of the update is kept. Those of a run that
        has left no checkpoint are set aside. Then the sinks start; one that cannot is reported and left out.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not step and self.path.exists():
            aside = self.path.with_name(f"aside-{self.path.name}")
            os.replace(self.path, aside)
            logger.warning("the run starts afresh, what an earlier one without a checkpoint has logged is in %s", aside)
        records = read_records(self.path) if step and self.path.exists() else []
        kept = [r for r in records if r["step"] < step or r["step"] == step and (whole_step or r["kind"] == "train")]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        for make_sink in self._makers:
            try:
                self.sinks.append(make_sink(kept))
            except Exception as error:
                logger.warning("a sink cannot start, its metrics go to %s only: %s", self.path.name, error)
        return kept

    def write(self, kind: str, step: int, **values: Any) -> None:
        record = strict({"step": step, "time": time.time(), "kind": kind, **values})
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        for sink in list(self.sinks):
            self._guarded(sink, functools.partial(sink.log, record))

    def _append(self, line: bytes) -> None:
        """Add a line after those that are still waiting; on a full disk they wait for the next one."""
        first_trouble, self._waiting = not self._waiting, self._waiting + line
        try:
            with open(self.path, "ab", buffering=0) as file:
                self._end = file.tell() if self._end is None else self._end
                file.truncate(self._end)
                if file.write(self._waiting) < len(self._waiting):
                    file.truncate(self._end)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting, self._end = b"", None
        except OSError as error:
            if first_trouble:
                logger.warning("%s cannot be written, its records wait in memory: %s", self.path, error.strerror)

    def sync(self) -> None:
        """Force what is written to the disk; a disk that cannot is no reason to end."""
        with contextlib.suppress(OSError):
            fsync_path(self.path)

    def close(self) -> None:
        if self._waiting:
            self._append(b"")
        for sink in list(self.sinks):
            self._guarded(sink, sink.close)

    def _guarded(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a sink is a stranger's code; whatever it raises must not end the run
            self.sinks.remove(sink)
            logger.warning("%s failed and is dropped: %s", type(sink).__name__, error)


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; what a crash cut short, and whatever has no step or kind, is left out."""
    return records_in(path.read_bytes())


def records_in(lines: bytes) -> list[Record]:
    """`read_records` of a part of the file."""
    return [record for record in map(record_of, lines.split(b"\n")) if record is not None]


def record_of(line: bytes) -> Record | None:
    """The record in a line; None where it is cut short, too deep, or has no step or kind."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str):
            return record
    return None
