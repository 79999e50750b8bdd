"""What makes a checkpoint whole: manifest.json with a size and a hash for each file, and the reading of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.disk import fsync_path, replace_json, sha256_of

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or none where one is needed; the message names the file."""

    exit_code = 74


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint whose manifest reaches outside its directory."""

    exit_code = 77


def write_manifest(directory: Path, step: int, files: list[dict[str, Any]], metrics: Mapping[str, float]) -> None:
    """List {name, size, sha256} of every file, which are on the disk already; force manifest and directory to it.

    A metric that is not finite has no place in JSON, and ranks no checkpoint.
    """
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "metrics": finite, "files": files}
    replace_json(directory / MANIFEST, {**manifest, "sha256": digest_of(manifest)})
    fsync_path(directory)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of all that a manifest says besides it: nothing else vouches for the manifest itself."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest that says what a manifest has to say. Raises CheckpointError naming the file."""
    file = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version, step = manifest["format_version"], manifest["step"]
        names = [name for name, _, _ in [(e["name"], e["size"], e["sha256"]) for e in manifest["files"]]]
        numbers = [step, *manifest["metrics"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format {version}, this program reads {FORMAT_VERSION}")
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise CheckpointError(f"{file}: a step or metric is no number")
    if TRAINER_STATE not in names:
        raise CheckpointError(f"{file}: lists no {TRAINER_STATE}")
    match = _STEP_NAME.fullmatch(directory.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{file}: is of step {step}, the directory says {int(match[1])}")
    for name in names:  # one with a separator could reach outside the directory
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise UnsafeCheckpointError(f"{file}: lists the forbidden name {name!r}")
    if len(set(names)) < len(names):
        raise CheckpointError(f"{file}: lists a name twice")
    if manifest.get("sha256") != digest_of(manifest):
        raise CheckpointError(f"{file}: content differs from what was written (sha256)")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming the first file that is not as written."""
    manifest = read_manifest(directory)
    listed = {entry["name"] for entry in manifest["files"]}
    unlisted = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in listed)
    if unlisted:  # a reader that takes every file of the directory would take it too
        raise CheckpointError(f"{directory / unlisted[0]}: is not in the manifest")

    def check(entry: dict[str, Any]) -> None:
        path, size = directory / entry["name"], entry["size"]
        try:
            if not path.is_file() or path.is_symlink():
                raise CheckpointError(f"{path}: missing")
            if path.stat().st_size != size:
                raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {size} were written")
            if sha256_of(path) != entry["sha256"]:
                raise CheckpointError(f"{path}: content differs from what was written (sha256)")
        except OSError as error:  # a disk that goes bad says so, where it does not give other bytes
            raise CheckpointError(f"{path}: unreadable ({error.strerror})") from None

    with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter's lock
        for _ in threads.map(check, manifest["files"]):
            pass
    return manifest
