"""Files as people have them: what loses nothing is read and said, and what could be two things is refused once."""

import gzip
import json

import pytest

from dataset.errors import RowError
from dataset.raw_rows import read_raw_rows, read_rows

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


def turns(*texts) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


def quoted(value) -> str:
    return '"' + str(value).replace('"', '""') + '"'


def test_messages_in_the_cells_of_a_prompt_are_json_and_other_text_stays_text(tmp_path):
    asked, code, places = json.dumps(turns("Hi")), "[x for x in y]", json.dumps([{"from": "Rome", "to": "Bari"}])
    path = write(
        tmp_path / "rows.csv",
        f"prompt,completion\n{quoted(asked)},{quoted(asked)}\n{code},[1]\n[],[Verse 1]\n"
        f"{quoted([{'n': 1}])},{quoted(places)}\n",
    )
    assert read(path)[0] == [
        (2, {"prompt": turns("Hi"), "completion": turns("Hi")}),
        (3, {"prompt": code, "completion": "[1]"}),
        (4, {"prompt": "[]", "completion": "[Verse 1]"}),
        (5, {"prompt": "[{'n': 1}]", "completion": places}),
    ]


@pytest.mark.parametrize("key", ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "tools"])
@pytest.mark.parametrize("wrap", ["{}", "array({}, dtype=object)"])
def test_a_list_as_python_prints_it_is_refused_with_the_way_out(tmp_path, key, wrap):
    path = write(tmp_path / "rows.csv", f"{key},b\n{quoted(wrap.format(turns('Hi')))},c\n")
    assert read(path)[0] == [(2, "JSON_SYNTAX")]
    assert "json.dumps" in message(path) and repr(key) in message(path)


def test_half_a_surrogate_pair_in_a_cell_is_one_bad_row(tmp_path):
    path = write(tmp_path / "rows.csv", 'messages\n"[{""role"": ""user"", ""content"": ""\\ud800""}]"\n')
    assert read(path)[0] == [(2, "UTF8")]


@pytest.mark.parametrize(
    ("content", "swallowed"),
    [
        ('a\tb\nq1\t"a1\nq2\ta2"\nq3\ta3\n', "q2\\ta2"),
        ('a\tb\tc\nq1\t"a1\tx1\nq2\ta2"\tx2\nq3\ta3\tx3\n', "q2\\ta2"),
    ],
)
def test_a_quote_that_may_have_swallowed_rows_of_tsv_is_refused(tmp_path, content, swallowed):
    path = write(tmp_path / "rows.tsv", content)
    found = read(path)[0]
    assert found[0] == (2, "CELLS") and found[1][0] == 4 and len(found) == 2
    assert swallowed in message(path)


@pytest.mark.parametrize("cell", ["def f():\n\treturn 1", "x\ny", "a\n\nb\tc\td"])
def test_a_quoted_cell_of_tsv_may_hold_lines_that_are_no_rows(tmp_path, cell):
    path = write(tmp_path / "rows.tsv", f"a\tb\nq1\t{quoted(cell)}\n{quoted(cell)}\tq2\n")
    assert [row for _, row in read(path)[0]] == [{"a": "q1", "b": cell}, {"a": cell, "b": "q2"}]


def test_lines_of_csv_cells_that_look_like_rows_are_said(tmp_path):
    path = write(tmp_path / "rows.csv", 'a,b\nq0,"x\ny"\nq1,"Well,\nyes, no"\n')
    found, (note,) = read(path)
    assert [row["b"] for _, row in found] == ["x\ny", "Well,\nyes, no"]
    assert note.startswith("1 row has a quoted cell") and "line 4" in note


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_carriage_returns_alone_end_lines_too(tmp_path, name):
    content = "a\rü\r2\r" if ".csv" in name else LINES.replace("\n", "\r")
    found, (note,) = read(write(tmp_path / name, content))
    assert [row for _, row in found] == ROWS and "carriage return" in note


def test_a_carriage_return_inside_one_object_is_a_space(tmp_path):
    assert read(write(tmp_path / "rows.jsonl", '{"a": [1,\r2]}')) == ([(1, {"a": [1, 2]})], [])


def test_a_first_line_that_names_the_separator_is_obeyed(tmp_path):
    found, said = read(write(tmp_path / "rows.csv", '\ufeffsep=;\r\na;"b, c"\r\n1;2\r\n'))
    assert found == [(3, {"a": "1", "b, c": "2"})]
    assert said == [BOM, "its first line says that ';' separates its cells"]


def test_a_blank_line_in_the_place_of_the_header_is_named(tmp_path):
    path = write(tmp_path / "rows.csv", "\na,b\n1,2\n")
    assert read(path)[0] == [(1, "BROKEN_FILE")] and "header" in message(path)


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-le", "utf-32-be"])
def test_utf_32_is_called_by_its_name(tmp_path, encoding):
    assert "iconv -f UTF-32" in message(write(tmp_path / "rows.jsonl", LINES.encode(encoding)))


def test_what_is_compressed_otherwise_is_called_compressed(tmp_path):
    import bz2
    import io
    import lzma
    import zipfile

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("rows.jsonl", LINES)
    for kind, content in {
        "bzip2": bz2.compress(LINES.encode()),
        "xz": lzma.compress(LINES.encode()),
        "zip": archive.getvalue(),
        "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    }.items():
        path = write(tmp_path / "rows.jsonl", content)
        assert read(path)[0] == [(0, "BROKEN_FILE")]
        assert f"compressed by {kind}" in message(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_in_a_file_of_another_name_is_one_and_said(tmp_path, indent):
    found, said = read(write(tmp_path / "rows.jsonl", json.dumps(ROWS, indent=indent)))
    assert [row for _, row in found] == ROWS
    assert said == ["holds one JSON array, whose values are its rows"]


def test_endings_may_be_written_large(tmp_path):
    assert read(write(tmp_path / "ROWS.TSV", "a\tb\n1\t2\n"))[0] == [(2, {"a": "1", "b": "2"})]
    assert read(write(tmp_path / "rows.json", gzip.compress(LINES.encode())).rename(tmp_path / "ROWS.JSON.GZ"))[0] == (
        list(enumerate(ROWS, 1))
    )


def test_two_columns_of_one_name_are_refused_in_tables_too(tmp_path):
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["q"])] * 3, names=["a", "b", "b"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        assert read(tmp_path / name)[0] == [(0, "BROKEN_FILE")]
        assert "'b' twice" in message(tmp_path / name)


def test_a_map_of_a_table_is_an_object_if_its_keys_are_texts(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def written(keys, rows):
        column = pyarrow.array(rows, pyarrow.list_(pyarrow.map_(keys, pyarrow.string())))
        parquet.write_table(pyarrow.table({"tools": column}), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    assert read(written(pyarrow.string(), [[[("a", "1")], []]]))[0] == [(1, {"tools": [{"a": "1"}, {}]})]
    assert read(written(pyarrow.int64(), [[[(1, "1")]]]))[0] == [(0, "BROKEN_FILE")]
    assert "'tools.element'" in message(tmp_path / "rows.parquet") and "int64" in message(tmp_path / "rows.parquet")
    assert read(written(pyarrow.string(), [[[("a", "1"), ("a", "2")]]]))[0] == [(1, "BROKEN_FILE")]
