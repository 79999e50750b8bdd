"""A batch is one flat sequence of whole documents, the same whoever fetches it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from dataset.packing import plan_rows
from dataset.prepare import DataOptions, prepare
from dataset.rows import FILLER, Document, PackedRows, collate
from dataset.shuffle import split
from dataset.store import StoreWriter, TokenStore
from tests.small_world import SHARED

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = [  # ids, and the mask of what is supervised
    ([10, 11, 12, 13], [0, 0, 1, 1]),
    ([20, 21, 22, 23, 24, 25], [0, 1, 0, 0, 1, 1]),
    ([30, 31], [0, 1]),
    ([40, 41, 42], [0, 0, 1]),
]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    with StoreWriter(tmp_path / "store", vocab_size=100) as writer:
        for line, (ids, supervised) in enumerate(SAMPLES, start=1):
            writer.add(np.array(ids), np.array(supervised, dtype=np.bool_), line, line)
        writer.publish(source="rows.jsonl", report={}, tokenizer_fingerprint="", template_fingerprint="")
    return TokenStore(tmp_path / "store")


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_a_batch_is_known(store):
    rows = PackedRows(store, plan_rows(store.lengths, 6))  # positions 3, 5, 1, 2: rows [0, 3], [1, 2]
    assert [[document.sample for document in rows[row]] for row in range(len(rows))] == [[0, 3], [1, 2]]
    batch = collate([rows[1], rows[FILLER], rows[0]])
    assert as_lists(batch) == {
        "input_ids": [20, 21, 22, 23, 24, 30, 0, 10, 11, 12, 40, 41],
        "position_ids": [0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 0, 1],
        "cu_seqlens": [0, 5, 6, 7, 10, 12],
        "document_lengths": [5, 1, 1, 3, 2],
        "supervised_positions": [0, 3, 4, 5, 8, 9, 11],
        "targets": [21, 24, 25, 31, 12, 13, 42],
        "sample_ids": [1, 2, -1, 0, 3],
        "num_tokens": 11,
    }
    kinds = {key: value.dtype for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("cu_seqlens") == torch.int32
    assert set(kinds.values()) == {torch.int64}
    assert {type(length) for length in batch["document_lengths"] + batch["sample_ids"]} == {int}


def test_a_batch_of_fillers_supervises_nothing(store):
    rows = PackedRows(store, plan_rows(store.lengths, 6))
    assert as_lists(collate([rows[FILLER], rows[FILLER]])) == {
        "input_ids": [0, 0],
        "position_ids": [0, 0],
        "cu_seqlens": [0, 1, 2],
        "document_lengths": [1, 1],
        "supervised_positions": [],
        "targets": [],
        "sample_ids": [-1, -1],
        "num_tokens": 0,
    }
    assert collate([rows[FILLER]])["targets"].dtype == torch.int64


def test_a_supervised_first_token_is_nobodys_target():
    first = Document(7, np.array([1, 2, 3]), np.array([True, False, True]))
    batch = collate([[first, first]])
    assert batch["supervised_positions"].tolist() == [1, 3]
    assert batch["targets"].tolist() == [3, 3]


def test_a_batch_equals_its_documents_one_by_one(store):
    rows = PackedRows(store, plan_rows(store.lengths, 6))
    batch = collate([rows[0], rows[1]])
    pairs = []
    for document in [*rows[0], *rows[1]]:
        for position in range(len(document.ids) - 1):
            if document.supervised[position + 1]:
                pairs.append((int(document.ids[position]), int(document.ids[position + 1])))
    inputs = batch["input_ids"][batch["supervised_positions"]].tolist()
    assert list(zip(inputs, batch["targets"].tolist(), strict=True)) == pairs


def test_a_part_of_a_store_keeps_its_sample_numbers(store):
    part = np.array([1, 3])
    rows = PackedRows(store, plan_rows(store.lengths[part], 8), part)
    assert collate([rows[0]])["sample_ids"] == [1, 3]
    assert rows.samples.tolist() == [1, 3]
    with pytest.raises(ValueError, match="the plan holds 2 samples, the data 4"):
        PackedRows(store, plan_rows(store.lengths[part], 8))


@pytest.mark.parametrize("row", [2, -2])
def test_a_row_outside_the_plan_is_an_error(store, row):
    with pytest.raises(IndexError, match="of 2"):
        PackedRows(store, plan_rows(store.lengths, 6))[row]


def test_rows_can_be_sent_to_a_worker(store):
    rows = PackedRows(store, plan_rows(store.lengths, 6))
    copy = pickle.loads(pickle.dumps(rows))
    assert as_lists(collate([copy[0], copy[1]])) == as_lists(collate([rows[0], rows[1]]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns whenever there are threads
def test_workers_change_nothing(store):
    rows = PackedRows(store, plan_rows(store.lengths, 5))
    order = [0, FILLER, 1, 2]
    batches = [
        [as_lists(batch) for batch in DataLoader(rows, 2, sampler=order, num_workers=workers, collate_fn=collate)]
        for workers in (0, 2)
    ]
    assert len(batches[0]) == 2
    assert batches[0] == batches[1]
    assert batches[0][0] != batches[0][1]


def test_a_prepared_file_reaches_the_batch(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model" / "tokenizer")
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"Say {word}", "answer": word} for word in ("one", "two", "three", "four")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = prepare(path, tokenizer, DataOptions("question", "answer", max_seq_len=64), tmp_path / "cache")
    batch = collate([row for row in PackedRows(store, plan_rows(store.lengths, 64))])
    assert sorted(batch["sample_ids"]) == [0, 1, 2, 3]
    said = tokenizer.decode(batch["targets"]).split("<|im_end|>")
    assert sorted(said) == sorted(["", "one", "two", "three", "four"])


def test_every_sample_of_real_data_is_in_the_batches_once(tmp_path):
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model" / "tokenizer")
    store = prepare(path, tokenizer, DataOptions("question", "answer"), tmp_path)
    part, _ = split(store.conversations, 0.1, 0)
    rows = PackedRows(store, plan_rows(store.lengths[part], 1024), part)
    seen, tokens, supervised = [], 0, 0
    for start in range(0, len(rows), 16):
        batch = collate([rows[row] for row in range(start, min(start + 16, len(rows)))])
        seen += batch["sample_ids"]
        tokens += len(batch["input_ids"])
        supervised += len(batch["targets"])
    assert sorted(seen) == part.tolist()
    assert tokens == (store.lengths[part] - 1).sum()
    assert supervised == sum(int(store.tokens(sample)[1].sum()) for sample in part.tolist())
