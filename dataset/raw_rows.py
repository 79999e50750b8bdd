"""Rows out of data files, whatever holds them: JSON lines, a JSON array, JSON objects over several lines, CSV and TSV
(all of them also gzipped), Parquet, Arrow.

What a file is, its first bytes say; CSV and TSV need their names. A row that cannot be read becomes a `RowError` with a
stable code instead of an exception, so that one pass over a file reports all of them. Arrays and objects over several
lines are held in memory whole, all else is read as it comes.
"""

import codecs
import contextlib
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dataset.delimited import cell_rows
from dataset.errors import RowError
from dataset.strict_json import parse_object

MAX_LINE_BYTES = 64 * 1024 * 1024  # what has no line end for so long is a file of another kind
UTF_16, UTF_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
COMPRESSED = {  # by other means than gzip, told by their first bytes
    **{b"BZh%d1A" % level: "bzip2" for level in range(1, 10)},
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\x04\x22\x4d\x18": "lz4",
}
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


def read_raw_rows(path: Path, say: Callable[[str], None] = lambda note: None) -> Iterator[tuple[int, RawRow]]:
    """As read_rows, but JSON comes as it is: other processes can parse it. `say` hears what was read leniently."""
    last = -1
    try:
        with path.open("rb") as file:
            for last, row in _rows_of(path, file, say):
                yield last, row
        if last < 0:
            yield 0, RowError("EMPTY_FILE", "the file is empty")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield max(last, 0) + 1, RowError("BROKEN_FILE", f"the gzip data end or break here: {error}")
    except UnicodeDecodeError as error:
        yield 0, RowError("BROKEN_FILE", f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}")
    except OSError as error:
        yield 0, RowError("NO_FILE", f"cannot be read: {error.strerror or error}")


def _rows_of(path: Path, file: BinaryIO, say: Callable[[str], None]) -> Iterator[tuple[int, RawRow]]:
    start = file.read(6)
    if start.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        yield from _table_rows(path, start)
        return
    if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
        yield 0, RowError("BROKEN_FILE", f"is compressed by {kind}: unpack it, or compress it by gzip")
        return
    file.seek(0)
    name = path.name.lower()
    if start.startswith(GZIP) or name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
        name = name.removesuffix(".gz")
        start = file.read(6)
    if encoding := _other_encoding(start):
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path.name)} > NEW"
        yield 0, RowError("BROKEN_FILE", f"is {encoding}: save it as UTF-8 ({command})")
        return
    begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    if begin:
        say("begins with a byte order mark, which is passed over")
    file.seek(begin)
    if text := _with_line_ends(file):
        say("its lines end with a carriage return alone, as old Macs wrote them, which is read as the end of a line")
        file, begin = text, 0
    file.seek(begin)
    form = "cells" if name.endswith((".csv", ".tsv")) else _form_of(file, name)
    file.seek(begin)
    if form == "objects":
        say("its objects stand over several lines each")
        yield from _object_rows(file.read().decode("utf-8"))
    elif form == "array":
        if not name.endswith(".json"):
            say("holds one JSON array, whose values are its rows")
        yield from _array_rows(file.read().decode("utf-8"))
    else:
        cells = form == "cells"
        rows = cell_rows(file, "\t" if name.endswith(".tsv") else ",", say) if cells else _json_lines(file)
        yield from _without_blank_end(rows, say)


def _other_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, where the first bytes have its mark or the zeros that it puts beside each ASCII character."""
    zeros = [byte == 0 for byte in start[:4]]
    if start.startswith(UTF_32) or zeros in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if start.startswith(UTF_16) or (len(zeros) > 1 and zeros[0] != zeros[1]) else None


def _with_line_ends(file: BinaryIO) -> BinaryIO | None:
    """The rest of a file that has carriage returns and no line feed, with line feeds; it is held in memory whole."""
    head = file.read(1 << 16)
    if b"\r" not in head or b"\n" in head:
        return None
    whole = head + file.read()
    one_row = b"\n" in whole or isinstance(parse_row(whole), dict)  # to JSON a carriage return is a space
    return None if one_row else io.BytesIO(whole.replace(b"\r", b"\n"))


def _form_of(file: BinaryIO, name: str) -> str:
    """array, objects (over several lines each) or lines: what the first bytes speak for."""
    head = b""
    while not head and (more := file.read(1 << 16)):
        head = more.lstrip()
    first, _, rest = (part.strip() for part in head.partition(b"\n"))
    if first.startswith(b"["):
        holds_rows = head[1:].lstrip()[:1] in (b"{", b"")
        is_row = rest and isinstance(found := parse_row(first), RowError) and found.code == "NOT_OBJECT"  # a wrong one
        return "array" if name.endswith(".json") or (holds_rows and not is_row) else "lines"
    if not first.startswith(b"{") or not rest or isinstance(parse_row(first), dict):
        return "lines"
    goes_on = first.endswith((b":", b"[")) or rest.startswith((b'"', b"}", b"]", b","))
    return "objects" if goes_on else "lines"  # a first row that is broken does not hide the others


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


def _without_blank_end(
    rows: Iterator[tuple[int, RawRow]], say: Callable[[str], None]
) -> Iterator[tuple[int, RawRow]]:  # fmt: skip
    """The rows, without the blank lines after the last of them."""
    blank: list[tuple[int, RawRow]] = []
    for line, row in rows:
        if isinstance(row, bytes) and (not row or row.isspace()):
            blank.append((line, b""))
            continue
        yield from blank
        blank.clear()
        yield line, row
    if blank:
        count = "1 blank line at its end is" if len(blank) == 1 else f"{len(blank)} blank lines at its end are"
        say(f"{count} passed over")


def _object_rows(text: str) -> Iterator[tuple[int, RawRow]]:
    """The objects of a text that holds one after the other."""
    return _values(text, _after_space(text, 0), "", _after_space)


def _array_rows(text: str) -> Iterator[tuple[int, RawRow]]:
    """The objects of one JSON array."""
    return _values(text, _after_space(text, text.index("[") + 1), "]", _after_comma)


def _values(text: str, at: int, close: str, next_after: Callable[[str, int], int]) -> Iterator[tuple[int, RawRow]]:
    """JSON values up to `close`, each under the line that it starts in; `next_after` the end of one begins the next."""
    line, counted = 1, 0
    while text[at : at + 1] != close:
        line, counted = line + text.count("\n", counted, at), at
        try:
            end = _end_of_value(text, at)
            yield line, text[at:end].encode()
            at = next_after(text, end)
        except RowError as error:
            yield line, error
            return
    if text[at + 1 :].strip():
        yield line, RowError("BROKEN_FILE", "there is more text after the end of the array")


def _after_comma(text: str, at: int) -> int:
    at = _after_space(text, at)
    if text[at : at + 1] == ",":
        at = _after_space(text, at + 1)
        if text[at : at + 1] == "]":
            raise RowError("BROKEN_FILE", "a comma stands before the end of the array")
    elif text[at : at + 1] != "]":
        raise RowError("BROKEN_FILE", "after this value a comma or the end of the array is missing")
    return at


def _end_of_value(text: str, at: int) -> int:
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        message = f"what follows is no JSON value, and nothing after it is read: {error}"
        raise RowError("BROKEN_FILE", message) from error


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
            file: Any = parquet.ParquetFile(path)
            schema, tables = file.schema_arrow, file.iter_batches(batch_size=1024)
        elif start.startswith(ARROW_FILE):
            file = ipc.open_file(pyarrow.memory_map(str(path)))
            schema, tables = file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            tables = ipc.open_stream(pyarrow.memory_map(str(path)))
            schema = tables.schema
        if unreadable := _unreadable(list(schema), ""):
            yield 0, RowError("BROKEN_FILE", unreadable)
            return
        for table in tables:
            table.validate(full=True)  # an offset that lies would read memory that is not the file's
            for values in table.to_pylist(maps_as_pydicts="strict"):
                row += 1
                yield row, plain(values)
    except KeyError as error:
        yield row + 1, RowError("BROKEN_FILE", f"a map in it has a key twice, here or in the next rows: {error}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield row + 1, RowError("BROKEN_FILE", f"cannot be read from here on: {error}")


def columns_of(path: Path) -> list[str]:
    """The columns of a table, also those that no row has a value in; of any other file none, and of a broken one."""
    import pyarrow
    from pyarrow import ipc, parquet

    with contextlib.suppress(pyarrow.ArrowException, OSError, UnicodeDecodeError):
        with path.open("rb") as file:
            start = file.read(6)
        if start.startswith(PARQUET):
            return list(parquet.read_schema(path).names)
        if start.startswith((ARROW_FILE, ARROW_STREAM)):
            opened = ipc.open_file if start.startswith(ARROW_FILE) else ipc.open_stream
            return list(opened(pyarrow.memory_map(str(path))).schema.names)
    return []


def _unreadable(fields: list[Any], where: str) -> str:
    """What in the columns of a table, or in the parts of one of them, objects of JSON cannot hold."""
    from pyarrow import types

    names = [field.name for field in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"names the column {where + twice[0][:40]!r} twice: rename one of them"
    for field in fields:
        kind, name = field.type, where + field.name
        if types.is_map(kind) and not (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
            return f"the keys of the map {name[:80]!r} are {kind.key_type}, no texts: store the column as JSON text"
        parts = [kind.item_field] if types.is_map(kind) else [kind.field(at) for at in range(kind.num_fields)]
        if found := _unreadable(parts, f"{name}."):
            return found
    return ""


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
        raise RowError("UTF8", "begins with a byte order mark, as where files were joined: take it out")
    if not text.strip():
        advice = "take such lines out (grep -v '^[[:space:]]*$' FILE > NEW)"
        raise RowError("BLANK_LINE", f"the line is blank, and rows follow: {advice}")
    return parse_object(text)
