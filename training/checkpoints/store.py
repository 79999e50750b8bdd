"""The file half of checkpoints: what is on the disk, whether it is whole, and which one counts.

A checkpoint exists when its directory has its final name `step-00000300`. It is written under `.tmp-step-00000300` by
all ranks, each with files of its own that it forces to the disk and lists in a part list; when all lists are there,
rank 0 writes `manifest.json` (name, size and sha256 of each file) last, and only then is the directory renamed and its
parent fsynced. A crash at any point leaves either the old state or the new one. Loading trusts no hint: it scans newest
first and takes the first whose files all hash to what the manifest says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoints.manifest import (
    _STEP_NAME,
    TRAINER_STATE,
    CheckpointError,
    read_manifest,
    verify,
    write_manifest,
)
from training.checkpoints.tensor_files import Block, bytes_of, write_shard
from training.disk import fsync_path, make_directory, remove, sha256_of, write_json

logger = logging.getLogger("train")

_LEFTOVER = re.compile(r"\.(tmp|trash)-(aside-(\d+-)?)?step-\d{8,}")  # of a save, of a deletion that was cut short


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; rank 0 alone calls the methods that change the disk, except `write_part`."""

    directory: Path
    keep_last: int = 3
    keep_best: int = 0
    metric: str = "eval/loss"
    mode: str = "min"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first; other names in the directory are not ours."""
        if not self.directory.is_dir():
            return []
        own = [path for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink()]
        matches = [_STEP_NAME.fullmatch(path.name) for path in own]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        return self.directory / f".tmp-step-{step:08d}"

    def set_aside_from(self, first: int, warn: Callable[[str], None]) -> None:
        """Rename what lies beyond the step that a run goes on from: it is damaged, or of a branch that is left.

        It must not count among the newest ones, or it would be kept and the new ones deleted.
        """
        for step in [s for s in self.steps() if s >= first]:
            warn(f"{self.path(step).name} is not of the run that goes on, it is set aside as {self._set_aside(step)}")
        if self.directory.is_dir():
            fsync_path(self.directory)

    def begin(self, step: int, needed_bytes: int = 0) -> None:
        """Make an empty directory to write into, where the final one will be. Raises OSError where there is no room."""
        with self._explained(needed_bytes):
            make_directory(self.directory)
            for leftover in self.directory.iterdir():
                if _LEFTOVER.fullmatch(leftover.name):
                    remove(leftover)
            if needed_bytes > shutil.disk_usage(self.directory).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.temporary(step).mkdir()

    def write_part(
        self, step: int, rank: int, ranks: int, shards: Mapping[str, Mapping[str, Block]], state: Any = None
    ) -> None:
        """Write one rank's files, `{kind}-0000r-of-0000N.safetensors` for each kind, and then its part list.

        Raises OSError with the place and the bytes needed and free.
        """
        directory = self.temporary(step)
        with self._explained(sum(map(bytes_of, shards.values()))):
            files = [
                write_shard(directory / f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors", blocks)
                for kind, blocks in shards.items()
            ]
            if state is not None:
                write_json(directory / TRAINER_STATE, state)
                size, digest = (directory / TRAINER_STATE).stat().st_size, sha256_of(directory / TRAINER_STATE)
                files.append({"name": TRAINER_STATE, "size": size, "sha256": digest})
            draft = directory / f".part-{rank}.draft"
            write_json(draft, files)
            os.replace(draft, directory / f".part-{rank}")

    def write(self, step: int, rank: int, ranks: int, shards: Any, state: Any, metrics: Any) -> Flight:
        """Write this rank's part in the background; on rank 0 also publish when all parts are there."""
        return Flight(self, step, rank, ranks, shards, state, metrics)

    def is_written(self, step: int, ranks: int) -> bool:
        """Whether every rank has written its part."""
        return all((self.temporary(step) / f".part-{rank}").is_file() for rank in range(ranks))

    def publish(self, step: int, ranks: int, metrics: Mapping[str, float] | None = None) -> Path:
        """Give the written directory its final name, then delete what need not be kept."""
        draft, final = self.temporary(step), self.path(step)
        parts = [draft / f".part-{rank}" for rank in range(ranks)]
        files = [entry for part in parts for entry in json.loads(part.read_text(encoding="utf-8"))]
        with self._explained(sum(entry["size"] for entry in files)):
            for part in parts:
                part.unlink()
            write_manifest(draft, step, files, metrics or {})
            if os.path.lexists(final):
                logger.warning("%s is in the way and set aside as %s", final, self._set_aside(step))
            os.rename(draft, final)
            try:
                fsync_path(self.directory)
            except OSError:  # what has failed must not look like what has not
                os.rename(final, draft)
                raise
        try:
            for old in self.retired():
                self.delete(self.path(old))
        except OSError as error:  # the new checkpoint stands; the next one tries again
            logger.warning("an old checkpoint could not be deleted: %s", error)
        return final

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let the manifest of a checkpoint, where there is one, tell what was measured only after it was saved.

        A disk that cannot take it is told and no reason to end.
        """
        if not self.path(step).is_dir():
            return
        manifest = read_manifest(self.path(step))
        if more := metrics.items() - manifest["metrics"].items():
            try:
                write_manifest(self.path(step), step, manifest["files"], {**manifest["metrics"], **dict(more)})
            except OSError as error:
                logger.warning("the metrics of step %d cannot be added to its checkpoint: %s", step, error)

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def manifests(self) -> dict[int, dict[str, Any]]:
        """The manifest of each step that has a readable one, oldest first; what has none is not ours to delete."""
        manifests = {}
        for step in self.steps():
            try:
                manifests[step] = read_manifest(self.path(step))
            except CheckpointError:
                continue
        return manifests

    def best(self, manifests: Mapping[int, dict[str, Any]]) -> list[int]:
        """The steps that are kept for their metric, best first."""
        sign = 1 if self.mode == "min" else -1
        measured = [step for step, manifest in manifests.items() if self.metric in manifest["metrics"]]
        best = sorted(measured, key=lambda step: (sign * manifests[step]["metrics"][self.metric], step))
        return best[: self.keep_best]

    def retired(self) -> list[int]:
        """Steps that are neither among the last ones nor among the best."""
        manifests = self.manifests()
        kept = {*list(manifests)[-self.keep_last :], *self.best(manifests)}
        return [step for step in manifests if step not in kept]

    def delete(self, path: Path) -> None:
        """Take the name away first, so that a crash in the middle leaves nothing that looks like a checkpoint."""
        trash = self.directory / f".trash-{path.name}"
        os.rename(path, trash)
        fsync_path(self.directory)
        shutil.rmtree(trash)

    def _set_aside(self, step: int) -> Path:
        number, aside = 1, self.directory / f"aside-{self.path(step).name}"
        while os.path.lexists(aside):
            number += 1
            aside = self.directory / f"aside-{number}-{self.path(step).name}"
        os.rename(self.path(step), aside)
        return aside

    def newest_verified(self, warn: Callable[[str], None]) -> int | None:
        """Step of the newest whole checkpoint, None where there is none; CheckpointError where all of them are bad."""
        problems = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
                return step
            except CheckpointError as error:
                problems.append(error)
                warn(f"checkpoint of step {step} is damaged, trying an older one: {error}")
        if problems:
            said = "\n".join(["every checkpoint is damaged, nothing to resume from:", *map(str, problems)])
            raise type(problems[0])(said)
        return None

    @contextlib.contextmanager
    def _explained(self, needed: int) -> Iterator[None]:
        """Let an OSError of this block say where it happened, and the bytes needed and free."""
        try:
            yield
        except OSError as error:
            try:
                free = f"{shutil.disk_usage(self.directory).free:,}"
            except OSError as unknown:
                free = f"unknown ({unknown.strerror})"
            where = error.filename or self.directory
            raise OSError(error.errno, f"{error.strerror}: {where}: {needed:,} bytes needed, {free} free") from error


class Flight:
    """One checkpoint on its way to the disk, in a thread that takes part in no exchange between ranks."""

    def __init__(self, store: CheckpointStore, step: int, rank: int, ranks: int, shards: Any, state: Any, metrics: Any):
        self.step, self.started = step, time.perf_counter()
        self.problem: Exception | None = None
        self._ended = threading.Event()

        def work() -> None:
            try:
                store.write_part(step, rank, ranks, shards, state)
                while rank == 0 and not store.is_written(step, ranks):
                    if self._ended.wait(0.01):
                        return
                if rank == 0:
                    store.publish(step, ranks, metrics)
            except Exception as error:  # whatever it is, the loop and the other ranks must hear of it
                self.problem = error

        self._thread = threading.Thread(target=work, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def end(self) -> None:
        """Wait for no other rank any more, and for this one's own writing."""
        self._ended.set()
        self._thread.join()
