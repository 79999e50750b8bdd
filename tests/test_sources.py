"""Every word of --data_path names its files, and every sample is trained as often as its weight says."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from dataset.errors import DataError
from dataset.load import DataRequest, load_rows
from dataset.prepare import DataOptions
from dataset.sources import Source, find_sources
from model.build import OWN_TOKENIZER, load_tokenizer


def write(path: Path, count: int, word: str = "x", bad: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{word} {number}?", "completion": f"{word} {number}"} for number in range(count)]
    rows += [{"prompt": "no answer"}] * bad
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_words_are_files_patterns_and_directories_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b/2.jsonl", "b/1.json", "b/deep/3.jsonl.gz", "b/notes.txt", "c:3,d.jsonl"):
        write(Path(name), 1)
    assert find_sources("a.jsonl") == [Source(Path("a.jsonl"))]
    assert find_sources("a.jsonl:2, b/*.jsonl:.5") == [Source(Path("a.jsonl"), 2.0), Source(Path("b/2.jsonl"), 0.5)]
    assert [s.path.name for s in find_sources("b")] == ["1.json", "2.jsonl", "3.jsonl.gz"]
    assert find_sources("c:3,d.jsonl") == [Source(Path("c:3,d.jsonl"))]
    assert find_sources("none.jsonl:2") == [Source(Path("none.jsonl"), 2.0)]  # the reader says that it is not there


def test_what_is_about_data_or_hidden_is_passed_over_and_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ("1.jsonl", "2.ndjson", "3.csv.gz", "deep/4.tsv", "deep/5.ndjson.gz")
    others = (
        ".git/x.json",
        ".hidden.jsonl",
        "config.json",
        "dataset_infos.json",
        "deep/dataset_info.json",
        "state.json",
    )
    for name in (*data, *others, "README.md", "1.jsonl.lock"):
        write(Path("d") / name, 1)
    said = []
    assert [str(s.path) for s in find_sources("d", say=said.append)] == [f"d/{name}" for name in data]
    assert said == [f"d: no data, passed over: {', '.join(others[:5])} and 1 more"]
    said.clear()
    assert [s.path.name for s in find_sources("d/*.json*", say=said.append)] == ["1.jsonl"]
    assert said == [
        "d/*.json*: no data, passed over: d/1.jsonl.lock, d/config.json, d/dataset_infos.json, d/state.json"
    ]
    assert [s.path.name for s in find_sources("d/config.json")] == ["config.json"]  # who names it wants it


def test_a_directory_says_what_of_it_is_not_read_and_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.jsonl", "d/b.JSONL", "d/c.json.GZ", "elsewhere/e.jsonl"):
        write(Path(name), 1)
    for name in ("r.jsonl.bz2", "s.JSONL.ZST", "t.txt", "u.py", "README.md", "LICENSE", "plot.png", ".gitattributes"):
        (Path("d") / name).write_text("x")
    Path("d/linked").symlink_to(Path("elsewhere").absolute())
    said: list[str] = []
    assert [s.path.name for s in find_sources("d", say=said.append)] == ["a.jsonl", "b.JSONL", "c.json.GZ"]
    assert said == [
        "d: not read: r.jsonl.bz2, s.JSONL.ZST (compressed: unpack them, or compress them by gzip); "
        "linked (links, which are not followed: name where they lead to); t.txt, u.py (other files)"
    ]
    for number in range(6):
        (Path("d") / f"v{number}.txt").write_text("x")
    find_sources("d", say=said.append)
    assert said[-1].endswith("; t.txt, u.py, v0.txt, v1.txt, v2.txt and 3 more (other files)")
    for path in ("a.jsonl", "b.JSONL", "c.json.GZ"):
        (Path("d") / path).unlink()
    with pytest.raises(ValueError, match=r"no file in it ends with .*; not read: r\.jsonl\.bz2, .* \(compressed"):
        find_sources("d")


@pytest.mark.parametrize(
    ("words", "first", "second"),
    [
        ("d/a.jsonl:2,d/a.jsonl:0.5", "'d/a.jsonl:2' gives it 2", "d/a.jsonl the weight 0.5"),
        ("d,d/a.jsonl:3", "'d' gives it 1", "d/a.jsonl the weight 3"),
        ("linked.jsonl,d/*.jsonl:2", "'linked.jsonl' gives it 1", "d/a.jsonl the weight 2"),
    ],
)
def test_two_weights_of_one_file_are_refused(tmp_path, monkeypatch, words, first, second):
    monkeypatch.chdir(tmp_path)
    Path("linked.jsonl").symlink_to(write(tmp_path / "d/a.jsonl", 1))
    with pytest.raises(ValueError, match=f"{second}, and {re.escape(first)}: name each file once"):
        find_sources(words)
    assert len(find_sources("d:2,d/a.jsonl:2")) == 2


def test_a_hidden_directory_may_be_named(tmp_path):
    write(tmp_path / ".data/a.jsonl", 1)
    assert [s.path.name for s in find_sources(str(tmp_path / ".data"))] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a.jsonl:0", "greater than 0"),
        ("a.jsonl:-1", "greater than 0"),
        ("*.parquet", "no file matches"),
        ("e", "no file in it"),
        ("a.jsonl,", "there is an empty name in it"),
        ("", "there is an empty name in it"),
    ],
)
def test_a_word_that_names_nothing_is_an_error(tmp_path, monkeypatch, word, message):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), 1)
    Path("e").mkdir()
    with pytest.raises(ValueError, match=f"--data_path .*{re.escape(word)}.*{message}"):
        find_sources(word)


def test_many_names_are_no_long_name(tmp_path):
    path = write(tmp_path / "a.jsonl", 1)
    assert len(find_sources(",".join([str(path)] * 200))) == 200


def test_a_data_set_saved_by_datasets_is_read_from_its_shards(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": str(n), "completion": str(n)} for n in range(6)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    assert [s.path.name for s in find_sources(str(tmp_path / "one"))] == [
        "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="several splits, name the directory of one: train, test"):
        find_sources(str(tmp_path / "two"))
    assert len(load(tmp_path, str(tmp_path / "one")).train.samples) == 6


def load(tmp_path: Path, data_path: str, options: dict | None = None, **wanted):
    request = DataRequest(
        data_path, seed=7, cache_dir=str(tmp_path / "cache"), options=DataOptions(**options or {}), **wanted
    )
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    return load_rows(request, tokenizer, True, echo=lambda line: None, rejects_file=tmp_path / "rejects.jsonl")


def trained(data) -> Counter:
    """How often each `file:line` stands in the rows of an epoch."""
    rows = data.train
    return Counter(rows.store.where(document.sample) for row in range(len(rows)) for document in rows[row])


def test_weights_give_exact_counts(tmp_path):
    a, b, c = (
        write(tmp_path / "a.jsonl", 10, "a"),
        write(tmp_path / "b.jsonl", 10, "b"),
        write(tmp_path / "c.jsonl", 7, "c"),
    )
    counts = trained(load(tmp_path, f"{a}:2,{b}:0.5,{c}:1.3"))
    assert [counts[f"{a}:{line}"] for line in range(1, 11)] == [2] * 10
    assert sorted(counts[f"{b}:{line}"] for line in range(1, 11)) == [0] * 5 + [1] * 5
    assert sorted(counts[f"{c}:{line}"] for line in range(1, 8)) == [1] * 5 + [2] * 2
    assert trained(load(tmp_path, f"{a}:2,{b}:0.5,{c}:1.3")) == counts
    assert set(trained(load(tmp_path, f"{a},{b}")).values()) == {1}


def test_a_held_out_sample_is_not_trained_whatever_its_weight(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 20, "a"), write(tmp_path / "b.jsonl", 20, "b")
    data = load(tmp_path, f"{a}:3,{b}", val_fraction=0.25)
    held_out = {data.held_out.store.where(sample) for sample in data.held_out.samples.tolist()}
    assert len(held_out) == 10
    assert not held_out & set(trained(data))
    assert len(held_out | set(trained(data))) == 40


def test_the_ledger_has_each_source_and_the_sums(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 4, "a"), write(tmp_path / "b.jsonl", 6, "a", bad=2)
    data = load(tmp_path, f"{a},{b}", options={"bad_rows": "skip"})
    report = data.report["train"]
    assert [(s["path"], s["rows_read"], s["rows_kept"]) for s in report["sources"]] == [(str(a), 4, 4), (str(b), 8, 6)]
    assert (report["rows_read"], report["rows_kept"], report["rows_rejected"], report["samples"]) == (12, 10, 2, 10)
    assert [(reject["path"], reject["line"]) for reject in data.rejects] == [(str(b), 7), (str(b), 8)]


def test_the_defects_of_all_sources_are_reported_at_once_and_written_down(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 4, bad=1), write(tmp_path / "b.jsonl", 6, bad=30)
    with pytest.raises(DataError, match=r"31 defects in the data, 11 of them not shown; .*rejects.jsonl has all"):
        load(tmp_path, f"{a},{b}")
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(written) == 31
    assert written[0] == {
        "path": str(a), "line": 5, "code": "MISSING_FIELD", "message": "the row has no 'completion', it has 'prompt'"
    }  # fmt: skip


def test_other_weights_are_other_data(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 10, "a"), write(tmp_path / "b.jsonl", 10, "b")
    identities = {
        load(tmp_path, words).identity["data"] for words in (f"{a},{b}", f"{a}:2,{b}", f"{b},{a}", f"{a},{b}:0.5")
    }
    assert len(identities) == 4


def test_what_cannot_be_counted_is_never_skipped(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a", "completion": "b"}, {"prompt"')
    with pytest.raises(DataError, match="BROKEN_FILE"):
        load(tmp_path, str(path), options={"bad_rows": "skip"})


def test_what_was_read_leniently_is_said_at_every_start_and_stands_in_the_ledger(tmp_path):
    path, said = write(tmp_path / "a.jsonl", 3), []
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n")
    notes = ["begins with a byte order mark, which is passed over", "1 blank line at its end is passed over"]
    request = DataRequest(str(path), cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        said.clear()
        data = load_rows(request, load_tokenizer(str(OWN_TOKENIZER)), True, echo=said.append)
        assert [line for line in said if "passed over" in line] == [f"{path}: {note}" for note in notes]
    assert data.report["train"]["sources"][0]["file_notes"] == notes
    plain = write(tmp_path / "b.jsonl", 3)
    assert load(tmp_path, str(plain)).identity == data.identity


def test_a_file_that_no_layout_fits_is_never_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match="--prompt_field question --response_field answer"):
        load(tmp_path, str(path), options={"bad_rows": "skip"})
    rows = load(tmp_path, str(path), options={"prompt_field": "question", "response_field": "answer"}).train
    assert rows.store.where(0) == f"{path}:2"


def test_duplicates_are_counted_and_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", 5)
    path.write_text(path.read_text() * 2)
    report = load(tmp_path, str(path)).report["train"]
    assert (report["duplicates"], report["samples"]) == (5, 10)


def test_the_ledger_counts_what_is_trained_and_held_out(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 20, "a"), write(tmp_path / "b.jsonl", 20, "a")
    report = load(tmp_path, f"{a}:3,{b}", val_fraction=0.25).report
    train, held_out = report["train"], report["held_out"]
    assert held_out["samples"] == 10 and train["samples"] == 3 * 15 + 15  # a row and its twin are on the same side
    store = load(tmp_path, f"{a},{b}").train.store  # both files hold the same
    of_one = sum(len(store.tokens(sample)[0]) for sample in range(20))
    assert train["tokens"] == 4 * (of_one - held_out["tokens"] // 2)
    assert train["duplicates"] == train["samples"] - 15 and held_out["duplicates"] == 5
    assert 0 < train["supervised_tokens"] < train["tokens"]


def test_all_defects_are_written_down_also_those_that_are_allowed(tmp_path):
    path = write(tmp_path / "a.jsonl", 3, "a", bad=1)
    path.write_text(path.read_text() + json.dumps({"prompt": "long", "completion": "many " * 200}) + "\n")
    with pytest.raises(DataError, match="1 defect in the data"):
        load(tmp_path, str(path), options={"overlong": "drop", "max_seq_len": 100})
    written = [json.loads(line)["code"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert sorted(written) == ["MISSING_FIELD", "OVERLONG"]


def test_what_was_left_out_is_said_at_every_start(tmp_path):
    path, said = write(tmp_path / "a.jsonl", 3, "a", bad=1), []
    request = DataRequest(str(path), cache_dir=str(tmp_path / "cache"), options=DataOptions(bad_rows="skip"))
    for _ in range(2):
        said.append([])
        load_rows(request, load_tokenizer(str(OWN_TOKENIZER)), True, echo=said[-1].append)
    for lines in said:
        assert any(line.endswith("1 rows left out with MISSING_FIELD") for line in lines)


def write_array(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_rows_that_share_a_line_are_rows_of_their_own(tmp_path):
    rows = [{"prompt": f"{number}?", "completion": str(number)} for number in range(100)]
    data = load(tmp_path, str(write_array(tmp_path / "a.json", rows)), val_fraction=0.1)
    assert (data.report["train"]["samples"], data.report["held_out"]["samples"]) == (90, 10)
    assert [data.train.store.stores[0].row(sample) for sample in range(3)] == [1, 2, 3]


def test_equal_rows_stay_on_one_side_also_with_system_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("Be brief.\nBe kind.\n")
    rows = [{"prompt": f"{number % 50}?", "completion": "yes"} for number in range(400)]
    path = write_array(tmp_path / "a.json", rows)
    wanted = {"val_fraction": 0.2, "system_prompts": str(tmp_path / "prompts.txt"), "system_prompt_ratio": 0.5}
    data = load(tmp_path, str(path), **wanted)
    asked = [
        {rows[part.store.stores[0].row(sample) - 1]["prompt"] for sample in part.samples.tolist()}
        for part in (data.train, data.held_out)
    ]
    assert not asked[0] & asked[1] and len(asked[1]) == 10


def test_a_conversation_that_stands_there_often_is_not_held_out_for_many(tmp_path):
    rows = [{"prompt": "a?", "completion": "b"}] * 90 + [{"prompt": f"{n}?", "completion": "b"} for n in range(10)]
    path = write_array(tmp_path / "a.json", rows)
    for seed in range(5):
        request = DataRequest(str(path), val_fraction=0.1, seed=seed, cache_dir=str(tmp_path / "cache"))
        data = load_rows(request, load_tokenizer(str(OWN_TOKENIZER)), True, echo=lambda line: None)
        assert len(data.held_out.samples) <= 10


def warned(tmp_path, data_path, **wanted) -> tuple[list[str], int]:
    said: list[str] = []
    request = DataRequest(data_path, seed=7, cache_dir=str(tmp_path / "cache"), **wanted)
    data = load_rows(request, load_tokenizer(str(OWN_TOKENIZER)), True, echo=said.append)
    return [line for line in said if line.startswith("warning")], data.report["held_out"]["samples_also_trained"]


def test_held_out_samples_that_are_also_trained_are_counted(tmp_path):
    a, b, c = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 4), write(tmp_path / "c.jsonl", 5, "other")
    line = f"warning: 4 of 4 held-out samples are also trained, the first is {b}:1"
    assert warned(tmp_path, str(a), val_data_path=str(b)) == ([line], 4)
    assert warned(tmp_path, f"{a},{b}", val_data_path=str(b)) == ([line], 4)
    assert warned(tmp_path, str(c), val_data_path=str(b)) == ([], 0)
    c.write_text(c.read_text() + b.read_text().splitlines()[2] + "\n")
    line = f"warning: 1 of 6 held-out samples is also trained, the first is {c}:6"
    assert warned(tmp_path, str(a), val_data_path=str(c)) == ([line], 1)


def test_a_held_out_part_of_the_same_file_is_not_trained(tmp_path):
    path = write(tmp_path / "a.jsonl", 40)
    assert warned(tmp_path, str(path), val_fraction=0.25) == ([], 0)
    path.write_text(path.read_text() * 2)  # twins stay on one side
    assert warned(tmp_path, str(path), val_fraction=0.25) == ([], 0)


def test_a_sample_that_no_stage_draws_is_not_trained(tmp_path):
    long = {"prompt": "many " * 30, "completion": "words"}
    a, b = write_array(tmp_path / "a.json", [long, {"prompt": "a", "completion": "b"}]), tmp_path / "b.json"
    write_array(b, [long])
    assert warned(tmp_path, str(a), val_data_path=str(b))[1] == 1
    assert warned(tmp_path, str(a), val_data_path=str(b), max_tokens=30) == ([], 0)


def test_a_weight_that_leaves_nothing_of_a_file_is_an_error(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 1)
    with pytest.raises(ValueError, match="b.jsonl:0.5: with this weight none of its 1 samples is left"):
        load(tmp_path, f"{a},{b}:0.5")


def test_a_slice_of_a_hub_split_is_refused():
    with pytest.raises(ValueError, match="a slice of a split cannot be read"):
        find_sources("owner/name@train[:10]")
