"""The token store: tokenised samples in memory-mapped files that many processes read at once.

A store is a directory of raw little-endian arrays and `meta.json`. It is written into a temporary directory and renamed
when it is complete, so a directory with its final name is a whole store, and a killed writer leaves nothing that counts.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
META = "meta.json"


class TokenStore:
    """Samples of one prepared data file: `tokens(i)` gives ids and mask, `where(i)` the line that they came from."""

    def __init__(self, directory: Path, source: str | None = None):
        """Opens a published store; `source` is the path to report when the same content lies elsewhere now."""
        self.directory = Path(directory)
        meta = read_meta(self.directory)
        self.source: str = source or meta["source"]
        self.fingerprint: str = meta["fingerprint"]
        self.report: dict[str, Any] = {**meta["report"], "path": self.source}
        arrays = {
            name: np.memmap(self.directory / f"{name}.bin", dtype=spec["dtype"], mode="r")
            for name, spec in meta["arrays"].items()
        }
        self._ids, self._supervised = arrays["ids"], arrays["supervised"]
        self._offsets, self._lines = arrays["offsets"], arrays["lines"]

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process maps the files itself instead of receiving a copy of them."""
        return TokenStore, (self.directory, self.source)

    @property
    def num_samples(self) -> int:
        return len(self._lines)

    @property
    def lengths(self) -> np.ndarray:
        """Stored tokens of each sample, int64 (samples,)."""
        return np.diff(self._offsets)

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids and the supervised mask (bool) of one sample, both (L,), as views of the files."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of a store of {self.num_samples}")
        part = slice(int(self._offsets[sample]), int(self._offsets[sample + 1]))
        return self._ids[part], self._supervised[part].view(np.bool_)

    def where(self, sample: int) -> str:
        """Returns `path:line` of the row that a sample was made from."""
        return f"{self.source}:{self._lines[sample]}"


class StoreWriter:
    """Writes a store sample by sample; nothing of it is visible before `publish`, and an error leaves nothing behind."""

    def __init__(self, directory: Path, vocab_size: int):
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._tmp = Path(tempfile.mkdtemp(prefix=f".tmp-{directory.name[:16]}-", dir=directory.parent))
        self._dtypes = {"ids": "<u2" if vocab_size <= 2**16 else "<u4", "supervised": "|u1"}
        self._dtypes |= {"offsets": "<i8", "lines": "<i8"}
        self._files = {name: (self._tmp / f"{name}.bin").open("wb") for name in self._dtypes}
        self._hashes = {name: hashlib.sha256() for name in self._dtypes}
        self._counts = dict.fromkeys(self._dtypes, 0)
        self._append("offsets", np.zeros(1))

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._tmp, ignore_errors=True)  # already gone when it was published

    def add(self, ids: np.ndarray, supervised: np.ndarray, line: int) -> None:
        """Appends one sample; line is its line in the source, counted from 1."""
        assert len(ids) == len(supervised) >= 2
        self._append("ids", ids)
        self._append("supervised", supervised)
        self._append("offsets", np.array([self._counts["ids"]]))
        self._append("lines", np.array([line]))

    def publish(self, source: str, report: dict[str, Any]) -> bool:
        """Gives the store its final name; False when another writer was faster, whose store then stands."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        trained = [
            f"{name}:{self._dtypes[name]}:{self._hashes[name].hexdigest()}" for name in ("ids", "supervised", "offsets")
        ]
        meta = {
            "format": FORMAT,
            "source": source,
            "fingerprint": hashlib.sha256("\n".join([str(FORMAT), *trained]).encode()).hexdigest(),
            "arrays": {name: {"dtype": self._dtypes[name], "count": self._counts[name]} for name in self._dtypes},
            "report": report,
        }
        with (self._tmp / META).open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, allow_nan=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(self._tmp)
        try:
            os.rename(self._tmp, self.directory)
        except OSError:
            if not is_published(self.directory):
                raise
            return False
        _fsync_directory(self.directory.parent)
        return True

    def _append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self._dtypes[name]).tobytes()
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._counts[name] += len(values)


def read_meta(directory: Path) -> dict[str, Any]:
    """Reads and checks the meta data of a store; raises ValueError when a file of it is missing or has the wrong size."""
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"{directory} has store format {meta['format']}, expected {FORMAT}")
        for name, spec in meta["arrays"].items():
            size, expected = (
                (directory / f"{name}.bin").stat().st_size,
                spec["count"] * np.dtype(spec["dtype"]).itemsize,
            )
            if size != expected:
                raise ValueError(f"{directory / name}.bin has {size} bytes, expected {expected}")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} is no token store: {error!r}") from error
    return meta


def is_published(directory: Path) -> bool:
    """True when the directory is a whole store of this format."""
    with contextlib.suppress(ValueError):
        read_meta(directory)
        return True
    return False


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
