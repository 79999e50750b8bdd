"""The same rows come out of every kind of file, and what breaks a file is said where it breaks."""

import datetime
import gzip
import json
import pickle

import pytest

from dataset.errors import RowError
from dataset.raw_rows import read_rows

ROWS = [{"a": 1, "b": ["x", {"c": "ü"}]}, {"a": 2}, {"a": 3, "b": []}]


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows=ROWS):
    import pyarrow

    return pyarrow.Table.from_pylist([{"a": row["a"], "b": json.dumps(row.get("b"))} for row in rows])


def codes(path) -> list:
    return [(line, row.code if isinstance(row, RowError) else "") for line, row in read_rows(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.json", "rows.json.gz"])
def test_json_lines_are_read_plain_and_zipped(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(jsonl()) if name.endswith(".gz") else jsonl())
    assert list(read_rows(path)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_with_the_lines_of_its_objects(tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=indent) + "\n", encoding="utf-8")
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS
    text = path.read_text(encoding="utf-8").splitlines()
    assert [line for line, _ in found] == [n for n, line in enumerate(text, 1) if line.startswith("  {")] or [2, 2, 2]


def test_an_array_may_be_zipped_and_begin_late(tmp_path):
    text = " " * 200_000 + json.dumps(ROWS)
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("rows.json", "rows.json.gz"):
        assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_an_error_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(RowError("UTF8", "not UTF-8")))
    assert (error.code, str(error)) == ("UTF8", "not UTF-8")


def test_what_json_has_no_type_for_is_text(tmp_path):
    from pyarrow import Table, parquet

    row = {
        "day": datetime.date(2024, 2, 29),
        "raw": "é".encode(),
        "bad": b"\xff",
        "nested": [{"at": datetime.datetime(2024, 1, 1)}],
        "n": 1.5,
    }
    parquet.write_table(Table.from_pylist([row]), tmp_path / "rows.parquet")
    ((_, found),) = read_rows(tmp_path / "rows.parquet")
    assert found == {
        "day": "2024-02-29",
        "raw": "é",
        "bad": b"\xff",
        "nested": [{"at": "2024-01-01 00:00:00"}],
        "n": 1.5,
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_columnar_files_give_their_rows(tmp_path, kind):
    from pyarrow import ipc, parquet

    path = tmp_path / "rows.data"
    if kind == "parquet":
        parquet.write_table(table(), path)
    else:
        make = ipc.new_file if kind == "arrow" else ipc.new_stream
        with path.open("wb") as file, make(file, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
    found = list(read_rows(path))
    assert [line for line, _ in found] == [1, 2, 3]
    assert [row["a"] for _, row in found] == [1, 2, 3]
    assert json.loads(found[0][1]["b"]) == ROWS[0]["b"]


def test_a_column_that_a_row_never_had_is_not_there(tmp_path):
    from pyarrow import Table, parquet

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    parquet.write_table(
        Table.from_pylist([{"messages": messages, "tools": None}, {"messages": None, "tools": "[]"}]),
        tmp_path / "rows.parquet",
    )
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == [{"messages": messages}, {"tools": "[]"}]


def test_a_cut_gzip_file_gives_what_is_whole_and_then_the_break(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"a": n, "b": str(n * 7919)} for n in range(20_000)]
    whole = gzip.compress(jsonl(rows))
    path.write_bytes(whole[: len(whole) // 2])
    found = codes(path)
    assert len(found) > 1000 and found[-1] == (len(found), "BROKEN_FILE")
    assert {code for _, code in found[:-1]} == {""}
    path.write_bytes(jsonl())
    assert codes(path) == [(1, "BROKEN_FILE")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n{"a": 2} {"a": 3}]', [(1, ""), (2, ""), (2, "BROKEN_FILE")]),
        ('[{"a": 1},\n{"a": ]', [(1, ""), (2, "BROKEN_FILE")]),
        ('[{"a": 1},\n{"a": 2}', [(1, ""), (2, ""), (2, "BROKEN_FILE")]),
        ('[{"a": 1}]\n[2]', [(1, ""), (1, "BROKEN_FILE")]),
        ('[{"a": 1},\n\n7, {"a": 1, "a": 2}, {"a": NaN}, {"a": 5}]', [
            (1, ""), (3, "NOT_OBJECT"), (3, "DUPLICATE_KEY"), (3, "NON_FINITE"), (3, "")]),
        ('[{"a": 1},\n]', [(1, ""), (1, "BROKEN_FILE")]),
        ("[]", [(0, "EMPTY_FILE")]),
        ("[" * 100_000, [(1, "BROKEN_FILE")]),
    ],
)  # fmt: skip
def test_a_wrong_array_is_read_as_far_as_it_goes(tmp_path, text, expected):
    (tmp_path / "rows.json").write_text(text)
    assert codes(tmp_path / "rows.json") == expected


@pytest.mark.parametrize("start", [b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"])
def test_a_columnar_file_that_is_none_is_broken(tmp_path, start):
    (tmp_path / "rows").write_bytes(start + b"\x10\x00\x00\x00nonsense" * 20)
    assert codes(tmp_path / "rows") == [(1, "BROKEN_FILE")]


def test_a_column_of_strings_that_are_none_is_a_broken_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "rows.parquet")
    assert codes(tmp_path / "rows.parquet") == [(1, "BROKEN_FILE")]
