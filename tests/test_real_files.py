"""Files as people have them: what loses nothing is read and said, and what could be two things is refused once."""

import gzip
import json

import pytest

from dataset.files import read_raw_rows, read_rows
from dataset.strict_json import RowError

ROWS = [{"a": "ü"}, {"a": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def read(path) -> tuple[list, list[str]]:
    said: list[str] = []
    lines = [line for line, _ in read_raw_rows(path, said.append)]
    rows = list(read_rows(path))
    assert lines == [line for line, _ in rows]
    return [(line, row.code if isinstance(row, RowError) else row) for line, row in rows], said


def message(path) -> str:
    return " | ".join(str(row) for _, row in read_rows(path) if isinstance(row, RowError))


BOM = "begins with a byte order mark, which is passed over"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson"])
@pytest.mark.parametrize(
    ("content", "note"),
    [
        (LINES, []),
        (LINES.replace("\n", "\r\n"), []),
        (LINES + "\n", ["1 blank line at its end is passed over"]),
        (LINES.replace("\n", "\r\n") + "\r\n \t\n", ["2 blank lines at its end are passed over"]),
        ("\ufeff" + LINES + "\n", [BOM, "1 blank line at its end is passed over"]),
    ],
)
def test_a_mark_at_the_start_and_blank_lines_at_the_end_lose_nothing(tmp_path, name, content, note):
    assert read(write(tmp_path / name, content)) == (list(enumerate(ROWS, 1)), note)


def test_a_blank_line_with_rows_after_it_is_refused_with_the_way_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n\n\r\n{"a": 2}\n\n')
    assert read(path)[0] == [(1, {"a": 1}), (2, "BLANK_LINE"), (3, "BLANK_LINE"), (4, {"a": 2})]
    assert "grep -v" in message(path)


def test_a_file_of_blank_lines_is_empty(tmp_path):
    assert read(write(tmp_path / "rows.jsonl", "\n\n"))[0] == [(0, "EMPTY_FILE")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.csv", "rows.tsv.gz"])
def test_a_file_in_utf_16_is_one_error_with_the_way_out(tmp_path, encoding, name):
    path = write(tmp_path / name, LINES.encode(encoding))
    assert read(path)[0] == [(0, "BROKEN_FILE")]
    assert "iconv -f UTF-16" in message(path)


CSV = 'instruction,input,output\r\n"Say ""hi"", twice",,"hi\nhi"\r\n007,x,1.0\r\n'
CELLS = [
    (2, {"instruction": 'Say "hi", twice', "input": "", "output": "hi\nhi"}),
    (4, {"instruction": "007", "input": "x", "output": "1.0"}),
]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.tsv", "rows.tsv.gz"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_table_of_text_gives_its_cells_as_they_are_written(tmp_path, name, start):
    content = CSV.replace(",", "\t").replace('""hi""\t', '""hi"",') if ".tsv" in name else CSV
    assert read(write(tmp_path / name, start + content + "\n\r\n")) == (
        CELLS,
        [BOM] * bool(start) + ["2 blank lines at its end are passed over"],
    )


@pytest.mark.parametrize(("separator", "spoken"), [(";", "';'"), ("\t", "tabs")])
def test_another_separator_in_the_header_is_found_and_said(tmp_path, separator, spoken):
    path = write(tmp_path / "rows.csv", f'a{separator}b\n"1,5"{separator}2\n')
    assert read(path) == ([(2, {"a": "1,5", "b": "2"})], [f"its cells are separated by {spoken}"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1\n1,2,3\n1,2\n", [(2, "CELLS"), (3, "CELLS"), (4, {"a": "1", "b": "2"})]),
        ("a,b\n1,2\n\n3,4\n", [(2, {"a": "1", "b": "2"}), (3, "BLANK_LINE"), (4, {"a": "3", "b": "4"})]),
        ("a,a\n1,2\n", [(1, "BROKEN_FILE")]),
        (",a\n0,2\n", [(2, {"": "0", "a": "2"})]),
        ("a,b\n", [(0, "EMPTY_FILE")]),
        ("", [(0, "EMPTY_FILE")]),
        ('a,b\n1,2\n"3,4\n', [(2, {"a": "1", "b": "2"}), (3, "BROKEN_FILE")]),
        ('a,b\n1,"2"x\n', [(2, "BROKEN_FILE")]),
        (b"a,b\n1,\xe9\n", [(2, "BROKEN_FILE")]),
    ],
)
def test_a_wrong_table_says_where(tmp_path, content, expected):
    assert read(write(tmp_path / "rows.csv", content))[0] == expected


def test_messages_and_tools_in_cells_are_json(tmp_path):
    turns = [{"role": "user", "content": "a"}]
    quoted = json.dumps(turns).replace('"', '""')
    path = write(
        tmp_path / "rows.csv", f'messages,tools,label\n"{quoted}",[],True\n"{quoted}",,false\n"[{{\'a\'",[],\n'
    )
    found, _ = read(path)
    assert found == [
        (2, {"messages": turns, "tools": [], "label": True}),
        (3, {"messages": turns, "tools": "", "label": False}),
        (4, "JSON_SYNTAX"),
    ]
    assert "in the JSON of the cell 'messages'" in message(path)


def test_a_cell_may_be_long(tmp_path):
    ((_, row),) = read_rows(write(tmp_path / "rows.csv", "a\n" + "x" * 300_000 + "\n"))
    assert len(row["a"]) == 300_000


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_objects_over_several_lines_are_rows(tmp_path, name):
    rows = [{"a": 1, "b": [{"c": 2}]}, {"a": 3}]
    content = "\n".join(json.dumps(row, indent=1) for row in rows) + "\n"
    found, said = read(write(tmp_path / name, content))
    assert found == [(1, rows[0]), (9, rows[1])]
    assert said == ["its objects stand over several lines each"]
    assert read(write(tmp_path / name, json.dumps(rows[0], indent=1)))[0] == [(1, rows[0])]


def test_an_array_over_several_lines_is_one_whatever_its_name(tmp_path):
    assert [row for _, row in read(write(tmp_path / "rows.jsonl", json.dumps(ROWS, indent=1)))[0]] == ROWS
    assert [row for _, row in read(write(tmp_path / "rows.jsonl", '[\n{"a": 1},\n{"a": 2}\n]\n'))[0]] == [
        {"a": 1},
        {"a": 2},
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "a": 1,\n "b": \n}\n', [(1, "BROKEN_FILE")]),
        ('{\n "a": 1\n}\n{\n "a": \n', [(1, {"a": 1}), (4, "BROKEN_FILE")]),
        ('{\n "a": 1\n}\n7\n', [(1, {"a": 1}), (4, "NOT_OBJECT")]),
        ('{\n "a": 1,\n "a": 2}\n', [(1, "DUPLICATE_KEY")]),
        (b'{\n "a": "\xff"\n}\n', [(0, "BROKEN_FILE")]),
    ],
)
def test_broken_json_over_several_lines_is_one_error(tmp_path, content, expected):
    assert read(write(tmp_path / "rows.json", content))[0] == expected


@pytest.mark.parametrize("first", ['{"a": 1,', "{", '{"a": "', '{"a": 1}'])
def test_a_broken_first_line_does_not_hide_the_others(tmp_path, first):
    found, _ = read(write(tmp_path / "rows.jsonl", first + '\n{"a": 2}\n"x"\n'))
    assert found[1:] == [(2, {"a": 2}), (3, "NOT_OBJECT")]
