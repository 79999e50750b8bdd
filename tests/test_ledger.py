"""What was read leniently, or not read, is counted for each file and said at every start."""

import json

import numpy as np

from dataset import ledger
from dataset.chat import Sample
from dataset.encode import _with_notes
from dataset.ledger import Ledger, note_lines, report_lines, spoken
from dataset.load import DataRequest, load_rows
from dataset.prepare import DataOptions, prepare
from model.build import OWN_TOKENIZER, load_tokenizer


def chat(number: int, **more: object) -> dict[str, object]:
    turns = [{"role": "user", "content": f"a {number}"}, {"role": "assistant", "content": "b"}]
    return {"messages": turns, **more}


ROWS = [
    chat(1),
    chat(2, source="web"),
    {"messages": [*chat(3)["messages"], {"role": "tool", "content": None}, {"role": "assistant", "content": "c"}]},
    chat(4, source="web", id=4, label=False),  # refused: what is not trained needs no note
    chat(5, source="book", id=5),
    chat(6, source=""),
]
NOTES = [
    {"note": "the field 'source' is not read", "rows": 2, "line": 2},
    {"note": "a tool result that is null is read as an empty text", "rows": 1, "line": 3},
    {"note": "tool results follow answers whose call stands in their text", "rows": 1, "line": 3},
    {"note": "the field 'id' is not read", "rows": 1, "line": 5},
]


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_notes_are_counted_and_said_at_every_start(tmp_path):
    path, tokenizer = write(tmp_path, ROWS), load_tokenizer(str(OWN_TOKENIZER))
    for start in range(2):
        said: list[str] = []
        store = prepare(path, tokenizer, DataOptions(bad_rows="skip"), tmp_path / "cache", echo=said.append)
        assert store.report["notes"] == NOTES
        assert f"{path}: the field 'source' is not read: 2 rows, the first is line 2" in said
        assert f"{path}: the field 'id' is not read: 1 row, the first is line 5" in said
        assert any("tokenised before" in line for line in said) == bool(start)


def test_the_report_of_all_sources_has_the_notes_of_each(tmp_path):
    path = write(tmp_path, ROWS)
    request = DataRequest(str(path), cache_dir=str(tmp_path / "cache"), options=DataOptions(bad_rows="skip"))
    data = load_rows(request, load_tokenizer(str(OWN_TOKENIZER)), owner=True, echo=lambda _: None)
    (source,) = data.report["train"]["sources"]
    assert source["notes"] == NOTES
    assert "  the field 'source' is not read: 2 rows, the first is line 2" in list(report_lines(data.report["train"]))


def test_a_note_that_several_samples_of_a_row_have_counts_once():
    counted = Ledger()
    counted.note(7, ["a", "b", "a"])
    counted.note(9, ["a"])
    assert counted.notes == {"a": [2, 7], "b": [1, 7]}


def test_keys_that_differ_from_row_to_row_do_not_fill_the_report(monkeypatch):
    monkeypatch.setattr(ledger, "MOST_NOTES", 3)
    monkeypatch.setattr(ledger, "SPOKEN_NOTES", 2)
    counted = Ledger()
    for line in range(1, 7):
        counted.note(line, [f"the field '{line}' is not read", f"the field '{line}0' is not read"])
    assert len(counted.notes) == 4 and counted.notes[ledger.OTHER_NOTES] == [5, 2]
    counted.notes["most"] = [9, 1]
    report = {
        "file_notes": [],
        "notes": [{"note": name, "rows": rows, "line": line} for name, (rows, line) in counted.notes.items()],
    }
    assert list(note_lines(report))[-1] == "3 more such notes are in data_report.json"
    assert len(list(note_lines(report))) == 3


def test_what_the_renderer_notes_of_a_sample_stands_beside_the_notes_of_its_row():
    sample = Sample(np.array([1]), np.array([True]), notes=("of the template",))
    assert _with_notes([sample], ("of the row",))[0].notes == ("of the row", "of the template")
    assert _with_notes([sample], ())[0] is sample


def test_a_file_without_notes_says_none(tmp_path):
    path = write(tmp_path, ROWS[:1])
    store = prepare(path, load_tokenizer(str(OWN_TOKENIZER)), DataOptions(), tmp_path / "cache", echo=lambda _: None)
    assert store.report["notes"] == [] and len(list(spoken(store.report))) == 1
