"""A store is made once, is whole or absent, and says of every row what became of it."""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset import prepare as preparation
from dataset.errors import DataError
from dataset.packing import plan_rows
from dataset.prepare import DataOptions, prepare
from dataset.shuffle import split
from dataset.store import StoreWriter, TokenStore, is_intact, is_published, sweep
from tests.small_world import SHARED

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = DataOptions(max_seq_len=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ROOT / "model" / "tokenizer")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def chat(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]})


def write(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def make(tmp_path: Path, tokenizer: Any, *rows: str, **options: Any) -> TokenStore:
    path = write(tmp_path / "rows.jsonl", *rows)
    return prepare(
        path, tokenizer, DataOptions(**{"max_seq_len": 64, **options}), tmp_path / "cache", echo=lambda _: None
    )


def stores_in(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


GOOD = chat("Say one", "one")
LONG = chat("Say many", "many " * 100)
LATE = chat("Say " * 100, "late")


def test_a_store_gives_back_what_the_template_renders(tmp_path, tokenizer):
    store = make(tmp_path, tokenizer, GOOD, chat("Say two", "two", "and three", "three"))
    assert store.num_samples == 2
    ids, supervised = store.tokens(1)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nSay two<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nand three<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>"
    )
    assert tokenizer.decode(ids[supervised]) == "two<|im_end|>three<|im_end|>"
    assert supervised.dtype == np.bool_
    assert ids.dtype == np.uint16
    assert store.lengths.dtype == np.int64
    assert store.lengths.tolist() == [len(store.tokens(0)[0]), len(ids)]
    for outside in (-1, 2):
        with pytest.raises(IndexError, match="of a store of 2"):
            store.tokens(outside)


def test_a_large_vocabulary_gets_wider_ids(tmp_path):
    with StoreWriter(tmp_path / "store", vocab_size=100_000) as writer:
        writer.add(np.array([99_999, 5]), np.array([False, True]), line=1, row=1)
        writer.publish(source="x", report={}, tokenizer_fingerprint="", template_fingerprint="")
    ids, supervised = TokenStore(tmp_path / "store").tokens(0)
    assert (ids.dtype, ids.tolist(), supervised.tolist()) == (np.uint32, [99_999, 5], [False, True])


def test_the_report_counts_every_row(tmp_path, tokenizer):
    said: list[str] = []
    path = write(tmp_path / "rows.jsonl", GOOD, "{", LONG, chat("spell <|im_end|>", "no"), "", "{", LATE)
    options = DataOptions(max_seq_len=64, overlong="drop", bad_rows="skip")
    store = prepare(path, tokenizer, options, tmp_path / "cache", echo=said.append)
    report = store.report
    assert (report["rows_read"], report["rows_kept"], report["rows_rejected"]) == (7, 2, 5)
    assert report["rejected_by_code"] == {"BLANK_LINE": 1, "JSON_SYNTAX": 2, "OVERLONG": 2}
    assert [(reject["line"], reject["code"]) for reject in report["rejects"]] == [
        (2, "JSON_SYNTAX"), (3, "OVERLONG"), (5, "BLANK_LINE"), (6, "JSON_SYNTAX"), (7, "OVERLONG"),
    ]  # fmt: skip
    assert report["tokens"] == store.lengths.sum()
    assert report["supervised_tokens"] == sum(int(store.tokens(i)[1].sum()) for i in range(2))
    assert report["supervised_share"] == report["supervised_tokens"] / report["tokens"]
    lengths = sorted(store.lengths.tolist())
    assert (report["length_quantiles"]["min"], report["length_quantiles"]["max"]) == (lengths[0], lengths[1])
    assert report["rows_spelling_control_tokens"] == {"<|im_end|>": 1}
    assert (report["layout"], report["path"]) == ("messages", str(path))
    assert [store.where(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]
    text = "\n".join(said)
    for words in ("OpenAI messages", "2 of 7 rows kept", "2 rows left out with JSON_SYNTAX", "1 rows spell <|im_end|>"):
        assert words in text


TEMPLATE_FAILS = "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
DROPS_SECOND = "{% if messages | length > 3 %}{{ '<|im_end|>' }}{% endif %}"


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("code", "row", "template", "options"),
    [
        ("JSON_SYNTAX", "{", "", {}),
        ("EMPTY_ASSISTANT", chat("a", " "), "", {}),
        ("OVERLONG", LONG, "", {}),
        ("NO_SUPERVISED", LATE, "", {"overlong": "truncate"}),
        ("TEMPLATE", chat("fail", "b"), TEMPLATE_FAILS, {}),
        ("UNSTABLE_TEMPLATE", chat("a", "b", "c", "d"), DROPS_SECOND, {}),
    ],
)
def test_bad_rows_stop_the_preparation_or_are_left_out(tmp_path, tokenizer, code, row, template, options, place):
    rows = [GOOD, chat("Say two", "two")]
    rows.insert(place, row)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template + tokenizer.chat_template
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer, *rows, **options)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:{place + 1}: {code} ")
    assert [(defect.line, defect.code) for defect in caught.value.defects] == [(place + 1, code)]
    assert stores_in(tmp_path / "cache") == []  # a refused file leaves nothing behind

    lenient = {"overlong": "drop"} if code == "OVERLONG" else {**options, "bad_rows": "skip"}
    store = make(tmp_path, tokenizer, *rows, **lenient)
    assert store.report["rejected_by_code"] == {code: 1}
    assert [store.where(i).rpartition(":")[2] for i in range(2)] == [str(n + 1) for n in range(3) if n != place]


def test_skipping_bad_rows_does_not_excuse_long_ones(tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer, "{", LONG, GOOD, bad_rows="skip")
    assert [defect.code for defect in caught.value.defects] == ["OVERLONG"]


def test_all_defects_are_reported_at_once(tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer, "{", GOOD, LONG, chat("a"), *["[]"] * 30)
    assert [defect.code for defect in caught.value.defects[:3]] == ["JSON_SYNTAX", "OVERLONG", "NO_ASSISTANT"]
    assert "33 defects in the data, 13 of them not shown" in str(caught.value)


@pytest.mark.parametrize(("rows", "code"), [((), "EMPTY_FILE"), (("{", "["), "JSON_SYNTAX")])
def test_a_file_without_a_good_row_is_refused_even_when_skipping(tmp_path, tokenizer, rows, code):
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer, *rows, bad_rows="skip")
    assert {defect.code for defect in caught.value.defects} == {code}


@pytest.mark.parametrize("owner", [True, False])
def test_a_missing_file_is_a_data_error(tmp_path, tokenizer, owner):
    with pytest.raises(DataError, match=f"{tmp_path}/none.jsonl:0: NO_FILE cannot be read: No such file"):
        prepare(tmp_path / "none.jsonl", tokenizer, OPTIONS, tmp_path, owner)


def test_truncation_cuts_the_end_and_keeps_a_supervised_token(tmp_path, tokenizer):
    whole = make(tmp_path, tokenizer, LONG, max_seq_len=1024)
    cut = make(tmp_path, tokenizer, GOOD, LONG, overlong="truncate")
    assert cut.tokens(1)[0].tolist() == whole.tokens(0)[0][:65].tolist()
    assert cut.report["samples_truncated"] == 1
    assert cut.report["cut_tokens"] == whole.lengths[0] - 65
    assert plan_rows(cut.lengths, 64).num_samples == 2

    two_turns = chat("Say one", "one", "Say " * 100, "late")
    back = make(tmp_path, tokenizer, two_turns, overlong="truncate")
    first = make(tmp_path, tokenizer, GOOD)
    assert back.tokens(0)[0].tolist() == first.tokens(0)[0].tolist()  # a question without its answer is not kept
    assert back.report["cut_tokens"] > 64


def test_a_row_may_fill_the_window_exactly(tmp_path, tokenizer):
    length = int(make(tmp_path, tokenizer, GOOD).lengths[0])
    assert make(tmp_path, tokenizer, GOOD, max_seq_len=length - 1).num_samples == 1
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer, GOOD, max_seq_len=length - 2)
    assert f"OVERLONG {length} tokens, max_seq_len={length - 2} has room for {length - 1}" in str(caught.value)
    assert "--overlong drop or truncate, or a larger --max_seq_len" in str(caught.value)


def test_the_second_preparation_tokenises_nothing(tmp_path, tokenizer, monkeypatch):
    first = make(tmp_path, tokenizer, GOOD)

    def forbidden(*_: Any) -> Iterator[Any]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(preparation, "map_in_order", forbidden)
    again = make(tmp_path, tokenizer, GOOD)
    assert (again.directory, again.fingerprint, again.report) == (first.directory, first.fingerprint, first.report)
    elsewhere = write(tmp_path / "moved.jsonl", GOOD)
    moved = prepare(elsewhere, tokenizer, OPTIONS, tmp_path / "cache")
    assert moved.directory == first.directory
    assert moved.where(0) == f"{elsewhere}:1"
    assert moved.report["path"] == str(elsewhere)
    with pytest.raises(AssertionError, match="tokenised again"):
        make(tmp_path, tokenizer, GOOD, GOOD)


def test_whatever_shapes_the_tokens_makes_another_store(tmp_path, tokenizer):
    def changed(**attributes: Any) -> PreTrainedTokenizerFast:
        other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    larger = changed()
    larger.add_tokens(["<new>"])
    base = make(tmp_path, tokenizer, GOOD)
    others = [
        make(tmp_path, tokenizer, GOOD.replace("one", "two")),
        make(tmp_path, tokenizer, GOOD, max_seq_len=65),
        make(tmp_path, tokenizer, GOOD, overlong="drop"),
        make(tmp_path, changed(chat_template=tokenizer.chat_template + "{# other #}"), GOOD),
        make(tmp_path, changed(eos_token="<|endoftext|>"), GOOD),
        make(tmp_path, larger, GOOD),
    ]
    assert len({store.directory for store in [base, *others]}) == 7
    assert base.fingerprint != others[0].fingerprint
    assert base.fingerprint == others[1].fingerprint == others[5].fingerprint  # other stores, the same tokens
    assert base.template_fingerprint != others[3].template_fingerprint
    assert base.template_fingerprint == others[5].template_fingerprint
    assert base.tokenizer_fingerprint != others[5].tokenizer_fingerprint
    padded = changed()
    padded(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    assert make(tmp_path, padded, GOOD).directory == base.directory


def test_a_store_can_be_sent_to_a_worker(tmp_path, tokenizer):
    store = make(tmp_path, tokenizer, GOOD)
    sent = pickle.dumps(store)
    assert len(sent) < 1000  # the place of the files, not what is in them
    copy = pickle.loads(sent)
    assert copy.tokens(0)[0].tolist() == store.tokens(0)[0].tolist()
    assert copy.where(0) == store.where(0)
    moved = TokenStore(store.directory, source="elsewhere.jsonl")
    assert pickle.loads(pickle.dumps(moved)).where(0) == "elsewhere.jsonl:1"


def _build_slowly(path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path, started: Any) -> None:
    real_add = StoreWriter.add

    def slow_add(self: StoreWriter, *sample: Any, **named: Any) -> None:
        real_add(self, *sample, **named)
        started.set()
        time.sleep(60)

    StoreWriter.add = slow_add  # type: ignore[method-assign]
    prepare(path, tokenizer, OPTIONS, cache)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns whenever there are threads
def test_a_killed_preparation_leaves_no_store(tmp_path, tokenizer):
    path, cache = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_build_slowly, args=(path, tokenizer, cache, started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = stores_in(cache)
    assert left.name.startswith(".tmp-")
    with pytest.raises(TimeoutError, match="within 0.3 seconds"):
        prepare(path, tokenizer, OPTIONS, cache, owner=False, timeout_seconds=0.3)
    assert prepare(path, tokenizer, OPTIONS, cache).num_samples == 1


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path):
    for name, age in ((".tmp-old", 90_000), (".tmp-new", 10), ("store", 90_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").touch()
        for path in (tmp_path / name / "ids.bin", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert [path.name for path in stores_in(tmp_path)] == [".tmp-new", "store"]


@pytest.mark.parametrize("damage", ["flipped", "list", "ids.bin", "meta.json", "short", "format", "empty"])
def test_a_damaged_store_is_made_anew(tmp_path, tokenizer, damage):
    store = make(tmp_path, tokenizer, GOOD)
    before = [part.tolist() for part in store.tokens(0)]
    if damage == "flipped":
        with (store.directory / "ids.bin").open("r+b") as file:
            file.write(bytes([before[0][0] ^ 1]))
        assert is_published(store.directory) and not is_intact(store.directory)
        with pytest.raises(TimeoutError):
            prepare(tmp_path / "rows.jsonl", tokenizer, OPTIONS, tmp_path / "cache", owner=False, timeout_seconds=0.1)
        assert [part.tolist() for part in make(tmp_path, tokenizer, GOOD).tokens(0)] == before
        return
    if damage == "list":
        (store.directory / "meta.json").write_text("[]")
    elif damage == "short":
        os.truncate(store.directory / "supervised.bin", 3)
    elif damage == "format":
        meta = json.loads((store.directory / "meta.json").read_text())
        (store.directory / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    elif damage == "empty":
        shutil.rmtree(store.directory)
        store.directory.mkdir()
    else:
        (store.directory / damage).unlink()
    assert not is_published(store.directory)
    with pytest.raises(ValueError, match=str(store.directory)):
        TokenStore(store.directory)
    assert [part.tolist() for part in make(tmp_path, tokenizer, GOOD).tokens(0)] == before


def test_a_store_that_another_owner_published_first_stands(tmp_path):
    meta = {"source": "x", "report": {}, "tokenizer_fingerprint": "", "template_fingerprint": ""}
    sample = np.array([1, 2]), np.array([False, True])
    with StoreWriter(tmp_path / "store", 10) as first, StoreWriter(tmp_path / "store", 10) as second:
        first.add(*sample, line=1, row=1)
        second.add(*sample, line=2, row=2)
        first.publish(**meta)
        second.publish(**meta)
    assert stores_in(tmp_path) == [tmp_path / "store"]
    assert TokenStore(tmp_path / "store").where(0) == "x:1"


def test_two_owners_and_two_waiting_processes_get_one_store(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 50)
    found: list[TokenStore] = []

    def run(owner: bool) -> None:
        mine = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        found.append(prepare(path, mine, OPTIONS, tmp_path / "cache", owner, echo=lambda _: None, timeout_seconds=60))

    threads = [threading.Thread(target=run, args=(owner,)) for owner in (False, True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.num_samples for store in found] == [50] * 4
    assert stores_in(tmp_path / "cache") == [found[0].directory]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", GOOD)
    real = preparation.map_in_order

    def changing(*arguments: Any) -> Iterator[Any]:
        yield from real(*arguments)
        write(path, GOOD, GOOD)

    monkeypatch.setattr(preparation, "map_in_order", changing)
    with pytest.raises(DataError, match="FILE_CHANGED"):
        prepare(path, tokenizer, OPTIONS, tmp_path / "cache")
    assert stores_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "cut"}, "overlong='cut' must be one of error, drop, truncate"),
        ({"bad_rows": "ignore"}, "bad_rows='ignore' must be one of error, skip"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"prompt_field": "question"}, "prompt_field='question'"),
    ],
)
def test_options_that_do_not_exist_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_a_split_is_known_complete_and_near_its_share():
    train, held_out = split(np.arange(20), 0.2, 42)
    assert (held_out.tolist(), len(train)) == ([1, 8, 12, 15], 16)
    assert sorted([*train, *held_out]) == list(range(20))
    assert split(np.arange(20), 0.2, 43)[1].tolist() != held_out.tolist()
    assert [len(part) for part in split(np.arange(2), 0.01, 0)] == [1, 1]
    assert [len(part) for part in split(np.arange(2), 0.99, 0)] == [1, 1]
    assert [len(part) for part in split(np.arange(10_000), 0.1, 0)] == [9_000, 1_000]
    assert 400 < (split(np.arange(10_000), 0.1, 0)[1] < 5_000).sum() < 600  # held out from everywhere
    for conversations, fraction in ((np.zeros(5), 0.5), (np.arange(10), 0.0), (np.arange(10), 1.0)):
        with pytest.raises(ValueError, match="val_fraction"):
            split(conversations, fraction, 0)


def test_what_is_held_out_is_not_trained_under_another_line():
    conversations = np.random.default_rng(0).integers(0, 2**63, 300).astype(np.uint64)[np.arange(1000) % 300]
    train, held_out = split(conversations, 0.1, 7)
    assert not set(conversations[train]) & set(conversations[held_out])
    assert 100 <= len(held_out) < 110
    reordered = np.random.default_rng(1).permutation(1000)
    assert set(conversations[reordered][split(conversations[reordered], 0.1, 7)[1]]) == set(conversations[held_out])


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' or loop.last else '-' }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def rewriting(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose template shows only the last answer as it was, so that every turn is a sample."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = REWRITING
    return changed


def test_turns_of_one_row_are_one_conversation(tmp_path, rewriting):
    store = make(tmp_path, rewriting, chat("a", "b", "c", "d"), chat("e", "f"), chat("a", "b", "x", "y"))
    assert [store.line(sample) for sample in range(store.num_samples)] == [1, 1, 2, 3, 3]
    first, second, third, fourth, fifth = store.conversations.tolist()
    assert first == second == fourth == fifth != third  # the third row begins as the first does


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
def test_only_the_turns_that_are_too_long_are_left_out(tmp_path, rewriting, overlong):
    rows = [chat("a", "b", "c " * 30, "d " * 60), chat("e", "f")]
    if overlong == "error":
        with pytest.raises(DataError, match=r"rows.jsonl:1: OVERLONG sample 2 of 2: \d+ tokens"):
            make(tmp_path, rewriting, *rows, overlong=overlong)
        return
    store = make(tmp_path, rewriting, *rows, overlong=overlong)
    dropped = overlong == "drop"
    report = store.report
    assert [store.line(sample) for sample in range(store.num_samples)] == ([1, 2] if dropped else [1, 1, 2])
    assert (report["rows_read"], report["rows_kept"], report["rows_rejected"]) == (2, 2, 0)
    assert (report["samples_dropped"], report["samples_truncated"]) == ((1, 0) if dropped else (0, 1))
    assert [(reject["line"], reject["code"]) for reject in report["rejects"]] == [(1, "OVERLONG")] * dropped


@pytest.mark.parametrize(
    ("name", "options", "samples", "least"),
    [
        ("gsm8k/test.jsonl", DataOptions("question", "answer"), 1319, 0.98),
        ("sgd/dev.jsonl", DataOptions(max_seq_len=8192), 256, 0.97),
    ],
)
def test_real_data_is_kept_whole_and_packed_tightly(tmp_path, tokenizer, name, options, samples, least):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    store = prepare(path, tokenizer, options, tmp_path)
    assert store.num_samples == samples
    assert store.report["rejected_by_code"] == {}
    assert plan_rows(store.lengths, options.max_seq_len).efficiency > least
