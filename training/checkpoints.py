"""The file half of checkpoints: what is on the disk, whether it is whole, and which one counts.

A checkpoint exists when its directory has its final name `step-00000300`. It is written under `.tmp-step-00000300`,
every file is fsynced, `manifest.json` (name, size and sha256 of each file) comes last, and only then is the directory
renamed and its parent fsynced. A crash at any point leaves either the old state or the new one. Loading trusts no hint:
it scans newest first and takes the first whose files all hash to what the manifest says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
RUN_FILES = (
    "checkpoints", "final", "best", "report", "wandb", "config.yaml", "state.json", "metrics.jsonl", "alerts.jsonl",
    "data_report.json", "environment.json", "control.json", "rejects.jsonl", "evaluation.json",
)  # fmt: skip
_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or none where one is needed; the message names the file."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint whose manifest reaches outside its directory."""


def fsync_path(path: Path) -> None:
    """Force a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON and force it to the disk; floats survive exactly (repr round-trips)."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: Any) -> None:
    """Replace a JSON file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_json(temporary, value)
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, step: int) -> None:
    """List every file of `directory` with its size and hash; force files, manifest and directory to the disk."""
    files = []
    for path in sorted(directory.iterdir()):
        fsync_path(path)
        files.append({"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)})
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "step": step, "files": files})
    fsync_path(directory)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming the first file that is not as written."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version, step = manifest["format_version"], manifest["step"]
        files = [(entry["name"], entry["size"], entry["sha256"]) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: unreadable ({error})") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory / MANIFEST}: format {version}, this program reads {FORMAT_VERSION}")
    if TRAINER_STATE not in [name for name, _, _ in files]:
        raise CheckpointError(f"{directory / MANIFEST}: lists no {TRAINER_STATE}")
    match = _STEP_NAME.fullmatch(directory.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{directory / MANIFEST}: is of step {step}, the directory says {int(match[1])}")
    for name, size, digest in files:
        path = directory / str(name)
        # A name with a separator could reach outside the directory.
        if not _FILE_NAME.fullmatch(str(name)):
            raise UnsafeCheckpointError(f"{directory / MANIFEST}: lists the forbidden name {name!r}")
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {size} were written")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path}: content differs from what was written (sha256)")
    return manifest


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; only rank 0 calls the methods that change the disk, except `temporary`."""

    directory: Path
    keep_last: int = 3

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first; other names in the directory are not ours."""
        if not self.directory.is_dir():
            return []
        matches = [_STEP_NAME.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        return self.directory / f".tmp-step-{step:08d}"

    def set_aside_newer(self, step: int, warn: Callable[[str], None]) -> None:
        """Rename what lies beyond the step that a run goes on from: it is damaged, or of a branch that is left.

        It must not count among the newest ones, or it would be kept and the new ones deleted.
        """
        for newer in [s for s in self.steps() if s > step]:
            aside = self.directory / f"aside-{self.path(newer).name}"
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(self.path(newer), aside)
            warn(f"the run goes on from step {step}: {self.path(newer).name} is set aside as {aside}")
        if self.directory.is_dir():
            fsync_path(self.directory)

    def begin(self, step: int) -> Path:
        """An empty directory to write into, on the filesystem of the final one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".t*-step-*"):  # .tmp- of a save, .trash- of a deletion that was cut short
            shutil.rmtree(leftover)
        self.temporary(step).mkdir()
        return self.temporary(step)

    def publish(self, step: int) -> Path:
        """Give the written directory its final name, then delete what is older than the last `keep_last`."""
        write_manifest(self.temporary(step), step)
        final = self.path(step)
        os.rename(self.temporary(step), final)
        fsync_path(self.directory)
        for old in self.steps()[: -self.keep_last]:
            self._retire(self.path(old))
        return final

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def _retire(self, path: Path) -> None:
        trash = path.with_name(f".trash-{path.name}")
        os.rename(path, trash)
        fsync_path(self.directory)
        shutil.rmtree(trash)

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


def check_run_directory(save_dir: Path, from_resume: str, continues: bool, overwrite: bool) -> None:
    """A directory that holds a run is continued, or emptied when told so, but never written over in silence.

    Raises ValueError naming the ways out. Nothing is deleted here: `clear_run` does so once the run is sure to start.
    """
    if from_resume not in ("0", "1") and not (Path(from_resume) / MANIFEST).is_file():
        inside = CheckpointStore(Path(from_resume) / "checkpoints")
        newest = f"; the newest of that run is {inside.path(inside.steps()[-1])}" if inside.steps() else ""
        raise ValueError(f"--from_resume {from_resume} is no checkpoint{newest}")
    steps, final = CheckpointStore(save_dir / "checkpoints").steps(), save_dir / "final"
    if continues and final.exists() and not steps:
        raise ValueError(
            f"--from_resume: {save_dir} holds a result but no checkpoint to continue from. Start a new run on the "
            f"result with --from_weight {final} and another --save_dir, or delete it with --overwrite 1 --from_resume 0"
        )
    if (steps or final.exists()) and not continues and not overwrite:
        raise ValueError(
            f"--save_dir {save_dir} already holds a run: continue it with --from_resume 1, choose another directory, "
            "or delete it with --overwrite 1"
        )


def clear_run(save_dir: Path) -> None:
    """Delete what a run has written; other files in the directory stay."""
    for name in RUN_FILES:
        path = save_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_run(save_dir: Path) -> IO[str]:
    """Hold the directory for this process until it ends; ValueError naming the process that has it already.

    A POSIX lock: the system gives it up when the process dies, however it dies, and forked workers do not inherit it.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    file = open(save_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closing it would give the lock up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(
            f"--save_dir {save_dir} is being trained by {holder}: wait for it, or choose another"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """What a verified checkpoint says of the loop; CheckpointError where that is no JSON object, whoever hashed it."""
    try:
        state: Any = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / TRAINER_STATE}: no JSON ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{directory / TRAINER_STATE}: a JSON object is needed, not a {type(state).__name__}")
    return state


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
