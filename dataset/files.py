"""Rows out of data files, whatever holds them: JSON lines (also gzipped), a JSON array, Parquet, Arrow.

What a file is, its first bytes say; only a JSON array needs the name `.json`. A row that cannot be read becomes a
`RowError` with a stable code instead of an exception, so that one pass over a file reports all of them. JSON is read
strictly, because a lenient parser trains what nobody wrote.
"""

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dataset.strict_json import RowError, parse_object

MAX_LINE_BYTES = 64 * 1024 * 1024  # what has no line end for so long is a file of another kind
GZIP, PARQUET, ARROW_FILE, ARROW_STREAM = b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
OF_THE_FILE = ("NO_FILE", "EMPTY_FILE", "BROKEN_FILE", "FILE_CHANGED")  # what they hide nobody can count: never skipped


RawRow = bytes | dict[str, Any] | RowError  # bytes are a line of JSON that nobody has looked at yet


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yields (line, object or error) for each row; an error of the file itself has line 0 or ends the file.

    `line` counts lines of JSON from 1, and rows in Parquet and Arrow.
    """
    for line, raw in read_raw_rows(path):
        yield line, parse_row(raw)


def parse_row(raw: RawRow) -> dict[str, Any] | RowError:
    """The object that a row holds, or why it holds none."""
    try:
        return _parse_line(raw) if isinstance(raw, bytes) else raw
    except RowError as error:
        return error


def read_raw_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """As read_rows, but lines of JSON come as they are: other processes can parse them."""
    last = 0
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            for last, row in _rows_of(path, file, start):
                yield last, row
        if last == 0:
            yield 0, RowError("EMPTY_FILE", "the file is empty")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield last + 1, RowError("BROKEN_FILE", f"the gzip data end or break here: {error}")
    except OSError as error:
        yield 0, RowError("NO_FILE", f"cannot be read: {error.strerror or error}")


def _rows_of(path: Path, file: BinaryIO, start: bytes) -> Iterator[tuple[int, RawRow]]:
    if start.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        yield from _table_rows(path, start)
        return
    if start.startswith(GZIP) or path.suffix == ".gz":
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    if path.name.endswith((".json", ".json.gz")) and _begins_array(file):
        yield from _array_rows(file)
    else:
        yield from _json_lines(file)


def _begins_array(file: BinaryIO) -> bool:
    begin = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    while not begin and (more := file.read(1 << 16)):
        begin = more.lstrip()
    file.seek(0)
    return begin.startswith(b"[")


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, RawRow]]:
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield line, RowError("LINE_TOO_LONG", f"the line has more than {MAX_LINE_BYTES} bytes")
        else:
            yield line, raw


def _array_rows(file: BinaryIO) -> Iterator[tuple[int, RawRow]]:
    """The objects of one JSON array, each under the line that it starts in; the whole text is held in memory."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 0, RowError("BROKEN_FILE", f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}")
        return
    at, line, counted = _after_space(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, RowError("BROKEN_FILE", f"what follows is no JSON value, and nothing after it is read: {error}")
            return
        try:
            yield line, parse_object(text[at:end])
        except RowError as error:
            yield line, error
        at = _after_space(text, end)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] == "]":
                yield line, RowError("BROKEN_FILE", "a comma stands before the end of the array")
                return
        elif text[at : at + 1] != "]":
            yield line, RowError("BROKEN_FILE", "after this value a comma or the end of the array is missing")
            return
    if text[at + 1 :].strip():
        yield line, RowError("BROKEN_FILE", "there is more text after the end of the array")


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _table_rows(path: Path, start: bytes) -> Iterator[tuple[int, RawRow]]:
    """Rows of a columnar file; a null is a column that the row does not have."""
    import pyarrow
    from pyarrow import ipc, parquet

    row = 0
    try:
        if start.startswith(PARQUET):
            tables: Any = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        elif start.startswith(ARROW_FILE):
            reader = ipc.open_file(pyarrow.memory_map(str(path)))
            tables = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            tables = ipc.open_stream(pyarrow.memory_map(str(path)))
        for table in tables:
            table.validate(full=True)  # an offset that lies would read memory that is not the file's
            for values in table.to_pylist():
                row += 1
                yield row, plain(values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield row + 1, RowError("BROKEN_FILE", f"cannot be read from here on: {error}")


def plain(value: Any) -> Any:
    """A table's value as JSON would have it: dates and such as text, bytes as the text that they are, no keys of null.

    A column has every key of every row, so a key that a row never had comes back as null. Bytes that are no UTF-8 stay
    bytes, for which there is no use.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
        return value
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("UTF8", f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from error
    if text.startswith("\ufeff"):
        raise RowError("UTF8", "begins with a byte order mark: save the file as UTF-8 without one")
    if not text.strip():
        raise RowError("BLANK_LINE", "the line is blank")
    return parse_object(text)
