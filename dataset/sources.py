"""From the words of --data_path to the files that they name, each with its weight.

`a.jsonl:2,b.parquet:0.5` names two files: every sample of the first is trained twice per epoch, of the second one half.
A word is a file, a pattern (`data/*.jsonl`), a directory, or a data set of the Hub (`owner/name/config@split`).
"""

import glob
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.errors import UnsafeDataError

PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*PLAIN, *(f"{suffix}.gz" for suffix in PLAIN), ".parquet", ".arrow")
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
PACKED = (".bz2", ".xz", ".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".rar")  # which the reader does not open
COMPANIONS = re.compile(  # what lies beside data and that nobody takes for data
    r"(readme|licen[cs]e|citation|changelog|notice)\b.*|.*\.(png|jpe?g|gif|webp|svg|lock|md)", re.IGNORECASE
)
NAMED = 5  # files that a note names
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<split>[\w+-]+))?")


@dataclass(frozen=True)
class Source:
    """A data file; `weight` is how often each of its samples is trained per epoch, on average."""

    path: Path
    weight: float = 1.0


def find_sources(
    data_path: str, flag: str = "--data_path", say: Callable[[str], None] = lambda note: None
) -> list[Source]:  # fmt: skip
    """The files that the words of a flag name, in their order; ValueError for a word that names none.

    `say` hears which files with the name of a data file are none, and which files of a directory are not read.
    """
    sources: list[Source] = []
    named: dict[str, tuple[str, float]] = {}  # of each file the first word that names it, and its weight
    for word in [data_path] if os.path.exists(data_path) else data_path.split(","):
        if not word.strip():
            raise ValueError(f"{flag} {data_path!r}: there is an empty name in it")
        try:
            name, weight = _weight_of(word.strip())
            for path in _files_of(name, say):
                before, other = named.setdefault(os.path.realpath(path), (word.strip(), weight))
                if other != weight:
                    raise ValueError(
                        f"gives {path} the weight {weight:g}, and {before!r} gives it {other:g}: name each file once"
                    )
                sources.append(Source(path, weight))
        except ValueError as error:
            kind = UnsafeDataError if isinstance(error, UnsafeDataError) else ValueError
            raise kind(f"{flag} {word.strip()}: {error}") from error
    return sources


def _weight_of(word: str) -> tuple[str, float]:
    name, colon, number = word.rpartition(":")
    if not colon or os.path.exists(word) or not re.fullmatch(r"-?\d+(\.\d*)?|-?\.\d+", number):
        return word, 1.0
    if not 0 < float(number) <= 1000:
        raise ValueError("the weight must be greater than 0 and at most 1000")
    return name, float(number)


def _files_of(name: str, say: Callable[[str], None]) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return _files_in(path, say)
    if path.exists():
        return [path]
    if glob.has_magic(name) and "@" not in name:
        found = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        found = _without_others(found, name, say)
        if not found:
            raise ValueError("no file matches")
        return found
    if re.search(r"@.*\[.*\]$", name):
        raise ValueError("a slice of a split cannot be read; take the split, and --file_fraction or --val_fraction")
    if not _is_data(name) and (hub := HUB_ID.fullmatch(name)):
        return _files_from_hub(**hub.groupdict())
    return [path]  # the reader says what is wrong with it


def _files_in(directory: Path, say: Callable[[str], None]) -> list[Path]:
    """Every data file below a directory, or the shards of what `datasets` saved there."""
    if (directory / "dataset_dict.json").is_file():
        splits = ", ".join(_listed(directory / "dataset_dict.json", "splits"))
        raise ValueError(f"it holds several splits, name the directory of one: {splits}")
    if (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file():
        entries = _listed(directory / "state.json", "_data_files")
        names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
        if outside := [name for name in names if name in ("", "..") or name != Path(str(name)).name]:
            raise UnsafeDataError(f"its state.json names {outside[0]!r}, which is no file in it")
        return [directory / name for name in names]
    found, others = [], []
    for path in sorted(directory.rglob("*")):
        (found if _is_data(path.name) and path.is_file() else others).append(path)
    unread = _unread(others, directory)
    found = _without_others(found, directory, say)
    if not found:
        raise ValueError(f"no file in it ends with {', '.join(SUFFIXES)}{f'; not read: {unread}' if unread else ''}")
    if unread:
        say(f"{directory}: not read: {unread}")
    return found


def _is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _unread(paths: list[Path], directory: Path) -> str:
    """Which of the other things in a directory may be data to somebody, and why they are not read."""
    linked, packed, others = [], [], []
    for path in paths:
        name = str(path.relative_to(directory))
        if any(part.startswith(".") for part in path.relative_to(directory).parts) or COMPANIONS.fullmatch(path.name):
            continue
        if path.is_symlink() and not path.is_file():
            linked.append(name)
        elif path.is_file():
            (packed if name.lower().endswith(PACKED) else others).append(name)
    reasons = (
        (packed, "compressed: unpack them, or compress them by gzip"),
        (linked, "links, which are not followed: name where they lead to"),
        (others, "other files"),
    )
    return "; ".join(f"{_few(names)} ({reason})" for names, reason in reasons if names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _without_others(found: list[Path], place: str | Path, say: Callable[[str], None]) -> list[Path]:
    """The files without those that are about data, and without hidden ones and what lies in hidden directories."""
    depth = len(place.parts) if isinstance(place, Path) else 0
    others = [
        path
        for path in found
        if path.name in ABOUT_DATA
        or path.suffix == ".lock"
        or (depth and any(part.startswith(".") for part in path.parts[depth:]))
    ]
    if others:
        say(f"{place}: no data, passed over: {_few([str(Path(*path.parts[depth:])) for path in others])}")
    return [path for path in found if path not in others]


def _listed(file: Path, key: str) -> list[Any]:
    """The list under a key of a JSON file; ValueError where there is none."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{file.name} in it cannot be read: {error!r}") from None


def _files_from_hub(name: str, config: str | None, split: str | None) -> list[Path]:
    """The Arrow files that `datasets` makes of a data set; downloaded once."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split or "train")
    except Exception as error:  # network, names, formats: whatever it is, the word is where to look
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"no such file, and as a data set of the Hub: {reason}") from error
    return [Path(entry["filename"]) for entry in rows.cache_files]
