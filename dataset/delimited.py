"""Rows of CSV and TSV files: the header names the keys, and every value is the text that its cell holds."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from dataset.strict_json import RowError, parse_json

LONGEST = 64 * 1024 * 1024  # characters of a cell, bytes of a line: a quote that nobody closes ends here
IN_JSON = ("messages", "conversations", "tools")  # columns that hold lists, which a cell can only hold as JSON
SPOKEN = {";": "';'", "\t": "tabs"}


def cell_rows(
    file: BinaryIO, separator: str, say: Callable[[str], None]
) -> Iterator[tuple[int, bytes | dict[str, Any] | RowError]]:
    """Yields (line in which it begins, row); a blank line is no bytes."""
    csv.field_size_limit(LONGEST)
    first = file.readline(LONGEST)
    if separator == "," and separator.encode() not in first:
        separator = next((other for other in SPOKEN if other.encode() in first), separator)
        if separator != ",":
            say(f"its cells are separated by {SPOKEN[separator]}")
    lines = (line.decode("utf-8") for line in itertools.chain([first], iter(lambda: file.readline(LONGEST), b"")))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            yield 1, RowError("BROKEN_FILE", f"its header names {twice[0][:40]!r} twice: rename one of the columns")
            return
        begins = reader.line_num + 1
        for cells in reader:
            yield begins, _row_of(header, cells) if cells else b""
            begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        yield reader.line_num + 1, RowError("BROKEN_FILE", f"not UTF-8 (byte {byte}): save the file as UTF-8")
    except csv.Error as error:
        yield begins, RowError("BROKEN_FILE", f"not to be read as CSV from here on: {error}")


def _row_of(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        few = "few" if len(cells) < len(header) else "many"
        advice = "text with separators, quotes or line ends stands between quotes"
        return RowError("CELLS", f"too {few} cells: {len(cells)}, where the header names {len(header)}; {advice}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in IN_JSON:
        if row.get(key, "").strip():
            try:
                row[key] = parse_json(row[key])
            except RowError as error:
                return RowError(error.code, f"in the JSON of the cell {key!r}: {error}")
    if row.get("label", "").lower() in ("true", "false"):  # whether the answer is wanted
        row["label"] = json.loads(row["label"].lower())
    return row
