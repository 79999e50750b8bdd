"""Rows for the data loader: a packed row is a list of documents, a batch is one flat sequence of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.packing import RowPlan
from dataset.store import JoinedStore, TokenStore

FILLER = -1  # the row that fills an uneven share, and the sample number of its document


@dataclass(frozen=True)
class Document:
    """One sample inside a row: L stored tokens, of which the last is only a target."""

    sample: int
    ids: np.ndarray  # (L,)
    supervised: np.ndarray  # bool (L,)


class PackedRows(Dataset[list[Document]]):
    """The rows of a plan as lists of documents; row -1 is a filler, which trains nothing.

    `indices` maps the plan's sample numbers to the store's, for a plan over part of a store.
    """

    def __init__(self, store: TokenStore | JoinedStore, plan: RowPlan, indices: np.ndarray | None = None):
        planned, given = len(plan.samples), store.num_samples if indices is None else len(indices)
        if planned != given:
            raise ValueError(f"the plan holds {planned} samples, the data {given}")
        self.store = store
        self.plan = plan
        self.samples = plan.samples if indices is None else np.asarray(indices)[plan.samples]

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, row: int) -> list[Document]:
        if row == FILLER:
            return [Document(FILLER, np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.bool_))]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        samples = self.samples[self.plan.offsets[row] : self.plan.offsets[row + 1]].tolist()
        return [Document(sample, *self.store.tokens(sample)) for sample in samples]


def longest_row(max_seq_len: int, longest_document: int) -> list[Document]:
    """A row that takes as much memory as rows can: full, all supervised, of documents as long as there are."""
    lengths = [longest_document] * (max_seq_len // longest_document) + [max_seq_len % longest_document]
    sizes = [max(2, length) for length in lengths if length]
    return [Document(FILLER, np.zeros(size, dtype=np.int64), np.ones(size, dtype=np.bool_)) for size in sizes]


def collate(rows: list[list[Document]]) -> dict[str, Any]:
    """Lays the documents of all rows end to end as one batch of T input positions without padding.

    A document of L tokens gives L - 1 positions; position t predicts the token after it in the same document, and
    `supervised_positions` lists those t whose target counts.
    """
    documents = [document for row in rows for document in row]
    stored = np.array([len(document.ids) for document in documents])
    ids = np.concatenate([document.ids for document in documents]).astype(np.int64)
    supervised = np.concatenate([document.supervised for document in documents])

    ends = np.cumsum(stored)
    is_input, is_target = np.ones(len(ids), dtype=np.bool_), np.ones(len(ids), dtype=np.bool_)
    is_input[ends - 1] = False
    is_target[ends - stored] = False
    next_ids, counted = ids[is_target], supervised[is_target]

    lengths = stored - 1
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(ids[is_input]),
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(boundaries.astype(np.int32)),
        "document_lengths": lengths.tolist(),
        "supervised_positions": torch.from_numpy(np.flatnonzero(counted)),
        "targets": torch.from_numpy(next_ids[counted]),
        "num_tokens": sum(len(d.ids) - 1 for d in documents if d.sample != FILLER),
        "sample_ids": [document.sample for document in documents],
    }
