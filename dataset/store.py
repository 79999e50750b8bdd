"""The token store: tokenised samples in memory-mapped files that many processes read at once.

A store is a directory of raw little-endian arrays and `meta.json`. It is written into a temporary directory and renamed
when it is complete, so a directory with its final name is a whole store; a killed writer leaves nothing that counts.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 3
META = "meta.json"
ARRAYS = {"ids", "supervised", "offsets", "lines", "rows", "targets", "digests"}
DTYPES = {"|u1", "<u2", "<u4", "<i4", "<i8", "<u8"}  # of plain numbers: an array of objects would be one of addresses
TRAINED = ("ids", "supervised", "offsets")  # the arrays that decide what is trained


class TokenStore:
    """Samples of one prepared data file: `tokens(i)` gives ids and mask, `where(i)` the line that they came from."""

    def __init__(self, directory: str | Path, source: str | None = None):
        """Opens a published store; `source` is the path to report when the same content lies elsewhere now."""
        self.directory = Path(directory)
        meta = read_meta(self.directory)
        self.source: str = source or meta["source"]
        self.fingerprint: str = meta["fingerprint"]
        self.tokenizer_fingerprint: str = meta["tokenizer_fingerprint"]
        self.template_fingerprint: str = meta["template_fingerprint"]
        self.report: dict[str, Any] = {**meta["report"], "path": self.source}
        self._ids, self._supervised, self._offsets, self._lines, self._rows, self.targets, self.digests = (
            np.asarray(np.memmap(self.directory / f"{name}.bin", dtype=meta["arrays"][name]["dtype"], mode="r"))
            for name in ("ids", "supervised", "offsets", "lines", "rows", "targets", "digests")
        )  # targets: supervised tokens that each sample trains; digests: equal where samples have the same ids

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
        return f"{self.source}:{self.line(sample)}"

    def line(self, sample: int) -> int:
        return int(self._lines[sample])

    def row(self, sample: int) -> int:
        """Which row of the source, counted from 1; all rows of a JSON array may stand in one line."""
        return int(self._rows[sample])

    @property
    def conversations(self) -> np.ndarray:
        """A number for each sample, uint64 (samples,): equal for samples of one row, and of rows that say the same."""
        starts = np.flatnonzero(np.diff(self._rows, prepend=0))
        return np.repeat(self.digests[starts], np.diff(starts, append=self.num_samples))


class JoinedStore:
    """Several stores as one: samples are numbered through, in the order of the stores."""

    def __init__(self, stores: Sequence[TokenStore]):
        self.stores = list(stores)
        self.starts = np.cumsum([0, *(store.num_samples for store in self.stores)])

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """As TokenStore.lengths."""
        return self._joined("lengths")

    @property
    def targets(self) -> np.ndarray:
        """As TokenStore.targets."""
        return self._joined("targets")

    @property
    def digests(self) -> np.ndarray:
        """As TokenStore.digests."""
        return self._joined("digests")

    @property
    def conversations(self) -> np.ndarray:
        """As TokenStore.conversations."""
        return self._joined("conversations")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(store.fingerprint for store in self.stores).encode()).hexdigest()

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """As TokenStore.tokens."""
        store, number = self._find(sample)
        return store.tokens(number)

    def where(self, sample: int) -> str:
        """As TokenStore.where."""
        store, number = self._find(sample)
        return store.where(number)

    def line(self, sample: int) -> int:
        """As TokenStore.line."""
        store, number = self._find(sample)
        return store.line(number)

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(store, name) for store in self.stores])

    def _find(self, sample: int) -> tuple[TokenStore, int]:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        index = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.stores[index], sample - int(self.starts[index])


class StoreWriter:
    """Writes a store sample by sample; nothing of it is visible before `publish`, and an error leaves nothing."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory = directory
        self._tmp = directory.parent / f".tmp-{directory.name[:16]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._tmp.mkdir(parents=True)
        ids = "<u2" if vocab_size <= 2**16 else "<u4"
        self._dtypes = {
            "ids": ids, "supervised": "|u1", "offsets": "<i8", "lines": "<i8", "rows": "<i8", "targets": "<i4",
            "digests": "<u8",
        }  # fmt: skip
        self._files = {name: (self._tmp / f"{name}.bin").open("wb") for name in self._dtypes}
        self._hashes = {name: hashlib.sha256() for name in self._dtypes}
        self._counts = dict.fromkeys(self._dtypes, 0)
        self._seen = array("Q")
        self._append("offsets", [0])

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for file in self._files.values():
                with contextlib.suppress(OSError):  # a full disk has been reported where it was met
                    file.close()
        finally:
            shutil.rmtree(self._tmp, ignore_errors=True)  # already gone when it was published

    def add(self, ids: np.ndarray, supervised: np.ndarray, line: int, row: int) -> None:
        """Appends one sample of a row of the source; line and row count from 1."""
        assert len(ids) == len(supervised) >= 2
        self._append("ids", ids)
        self._append("supervised", supervised)
        self._append("offsets", [self._counts["ids"]])
        self._append("lines", [line])
        self._append("rows", [row])
        self._append("targets", [np.count_nonzero(supervised[1:])])
        digest = hashlib.blake2b(np.asarray(ids, dtype="<u4").tobytes(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        self._append("digests", [number])
        self._seen.append(number)

    @property
    def duplicates(self) -> int:
        """Samples so far that are the same as an earlier one."""
        return len(self._seen) - len(np.unique(self._seen))

    def publish(self, **meta: Any) -> None:
        """Gives the store its final name; when another writer was faster, its store stands and this one goes."""
        for file in self._files.values():
            _flush(file)
        trained = [f"{name} {self._dtypes[name]} {self._hashes[name].hexdigest()}" for name in TRAINED]
        meta |= {
            "format": FORMAT,
            "fingerprint": hashlib.sha256("\n".join(trained).encode()).hexdigest(),
            "arrays": {
                name: {
                    "dtype": self._dtypes[name],
                    "count": self._counts[name],
                    "sha256": self._hashes[name].hexdigest(),
                }
                for name in self._dtypes
            },
        }
        with (self._tmp / META).open("w", encoding="utf-8") as meta_file:
            json.dump(meta, meta_file, ensure_ascii=False, allow_nan=False, indent=1)
            _flush(meta_file)
        _fsync_directory(self._tmp)
        try:
            os.rename(self._tmp, self.directory)
        except OSError:
            if not is_published(self.directory):
                raise
        _fsync_directory(self.directory.parent)

    def _append(self, name: str, values: Any) -> None:
        data = np.asarray(values, dtype=self._dtypes[name]).tobytes()
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._counts[name] += len(values)


def read_meta(directory: Path) -> dict[str, Any]:
    """Reads the meta data of a store; raises ValueError when a file is missing or has the wrong size."""
    try:
        meta: dict[str, Any] = json.loads((directory / META).read_text(encoding="utf-8"))
        if not isinstance(meta["report"], dict) or meta["format"] != FORMAT:
            raise ValueError(f"{directory} has store format {meta['format']}, expected {FORMAT}")
        if meta["arrays"].keys() != ARRAYS or not {array["dtype"] for array in meta["arrays"].values()} <= DTYPES:
            raise ValueError(f"{directory} has other arrays than a store has")
        for name, array in meta["arrays"].items():
            size, expected = (
                (directory / f"{name}.bin").stat().st_size,
                array["count"] * np.dtype(array["dtype"]).itemsize,
            )
            if size != expected:
                raise ValueError(f"{directory / name}.bin has {size} bytes, expected {expected}")
    except (OSError, LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{directory} is no token store: {error!r}") from error
    return meta


def is_published(directory: Path) -> bool:
    """True when the directory is a whole store of this format."""
    try:
        read_meta(directory)
    except ValueError:
        return False
    return True


def is_intact(directory: Path) -> bool:
    """True when every array also holds what was written; reads them all."""
    try:
        for name, array in read_meta(directory)["arrays"].items():
            with (directory / f"{name}.bin").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != array["sha256"]:
                    return False
    except (ValueError, KeyError, OSError):
        return False
    return True


def sweep(cache_dir: Path, older_than_seconds: float = 24 * 3600) -> None:
    """Deletes what killed writers left, once nothing in it has been written for a day."""
    for directory in cache_dir.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may sweep too
            newest = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
            if time.time() - newest > older_than_seconds:
                shutil.rmtree(directory)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
