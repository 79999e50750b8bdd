"""Rows of CSV and TSV files: the header names the keys, and every value is the text that its cell holds.

What a layout declares as JSON is the exception: lists of messages, for which a cell has no other form.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from dataset.errors import RowError
from dataset.formats import LAYOUTS, PAIR
from dataset.strict_json import parse_json

LONGEST = 64 * 1024 * 1024  # characters of a cell, bytes of a line: a quote that nobody closes ends here
SPOKEN = {";": "';'", "\t": "tabs"}
JSON_CELLS = frozenset[str]().union(*(layout.json_cells for layout in LAYOUTS.values()))
MESSAGE_CELLS = PAIR.union(*(layout.message_cells for layout in LAYOUTS.values()))
NAMES_SEPARATOR = re.compile(rb'"?sep=(.)"?\r?\n')  # a first line that Excel understands
PYTHON_LIST = re.compile(r"\s*(array\()?\[\s*(\{\s*'|array\(|None\b|True\b|False\b|')")
OBJECTS = re.compile(r"""\s*(array\()?\[\s*\{\s*['"]""")
END_OF_OBJECTS = re.compile(r"\}\s*\](\)|, dtype=object\))?\s*\Z")
SPEAKER = re.compile(r"""['"](role|from)['"]\s*:\s*['"]""")


def cell_rows(
    file: BinaryIO, separator: str, say: Callable[[str], None]
) -> Iterator[tuple[int, bytes | dict[str, Any] | RowError]]:
    """Yields (line in which it begins, row); a blank line is no bytes."""
    csv.field_size_limit(LONGEST)
    first, before = file.readline(LONGEST), 0
    if named := NAMES_SEPARATOR.fullmatch(first):
        separator = named[1].decode("latin-1")
        say(f"its first line says that {separator!r} separates its cells")
        first, before = file.readline(LONGEST), 1
    elif separator == "," and separator.encode() not in first:
        separator = next((other for other in SPOKEN if other.encode() in first), separator)
        if separator != ",":
            say(f"its cells are separated by {SPOKEN[separator]}")
    if first and not first.strip():
        yield before + 1, RowError("BROKEN_FILE", "a blank line stands where the header belongs: take it out")
        return
    lines = (line.decode("utf-8") for line in itertools.chain([first], iter(lambda: file.readline(LONGEST), b"")))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    begins, over_rows, first_over = before + 1, 0, 0
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            error = RowError("BROKEN_FILE", f"its header names {twice[0][:40]!r} twice: rename one of the columns")
            yield begins, error
            return
        begins = before + reader.line_num + 1
        for cells in reader:
            swallowed = _row_in_cell(cells, len(header), separator) if before + reader.line_num > begins else ""
            if swallowed and separator == "\t":
                yield begins, _two_readings(swallowed)
            else:
                if swallowed:  # prose has commas too
                    over_rows, first_over = over_rows + 1, first_over or begins
                yield begins, _row_of(header, cells) if cells else b""
            begins = before + reader.line_num + 1
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        yield before + reader.line_num + 1, RowError("BROKEN_FILE", f"not UTF-8 (byte {byte}): save the file as UTF-8")
    except csv.Error as error:
        advice = "a cell that begins with a quote ends with one, and every quote inside it is doubled"
        yield begins, RowError("BROKEN_FILE", f"not to be read as CSV from here on: {error}; {advice}")
    if over_rows:
        count = "1 row has" if over_rows == 1 else f"{over_rows} rows have"
        say(
            f"{count} a quoted cell over several lines, one of which has as many {separator!r} as the header: see "
            f"whether a quote opens in line {first_over} that should not"
        )


def _row_in_cell(cells: list[str], columns: int, separator: str) -> str:
    """The first line of a cell that could be one of a row, had nobody quoted it; one that begins with space is text."""
    for place, cell in enumerate(cells):
        _, *others = cell.split("\n")
        for number, line in enumerate(others, start=1):
            beside = len(cells) - place - 1 if number == len(others) else 0  # cells that stand in the same line
            inside = line.count(separator)
            if inside and inside + beside == columns - 1 and not line[0].isspace():
                return line
    return ""


def _two_readings(line: str) -> RowError:
    return RowError(
        "CELLS",
        f"a quote opens a cell of several lines, and its line {line[:40]!r} looks like a row of its own: "
        "double the quotes and put cells that hold them in quotes, or store the rows as JSON lines",
    )


def _row_of(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        few = "few" if len(cells) < len(header) else "many"
        advice = "text with separators, quotes or line ends stands between quotes"
        return RowError("CELLS", f"too {few} cells: {len(cells)}, where the header names {len(header)}; {advice}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    try:
        for key in sorted(JSON_CELLS & row.keys()):
            row[key] = _json_of(key, row[key]) if row[key].strip() else row[key]
        for key in sorted(MESSAGE_CELLS & row.keys()):
            row[key] = _messages_of(key, row[key])
    except RowError as error:
        return error
    if row.get("label", "").lower() in ("true", "false"):  # whether the answer is wanted
        row["label"] = json.loads(row["label"].lower())
    return row


def _json_of(key: str, cell: str) -> Any:
    try:
        return parse_json(cell)
    except RowError as error:
        python = "; it is a list as Python prints it: write the column with json.dumps" * bool(PYTHON_LIST.match(cell))
        raise RowError(error.code, f"in the JSON of the cell {key!r}: {error}{python}") from error


def _messages_of(key: str, cell: str) -> Any:
    """The messages that a cell holds as JSON; any other text as it is, also one that only begins like a list."""
    if not (OBJECTS.match(cell) and END_OF_OBJECTS.search(cell[-200:]) and SPEAKER.search(cell)):
        return cell
    found = _json_of(key, cell)
    speak = all("role" in turn or {"from", "value"} <= turn.keys() for turn in found if isinstance(turn, dict))
    return found if speak and isinstance(found, list) else cell
