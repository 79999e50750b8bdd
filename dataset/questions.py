"""Held-out samples as questions: what a model is asked, and the answer that stands in the data."""

from typing import NamedTuple

import numpy as np

from dataset.rows import PackedRows


class Question(NamedTuple):
    sample: int
    prompt: list[int]  # token ids up to the last answer
    expected: list[int]  # of the answer
    end: int  # the token that closes it


def question_of(sample: int, ids: np.ndarray, supervised: np.ndarray) -> Question | None:
    """The last supervised stretch of a sample as the answer; None where nothing stands before it."""
    tokens, trained = ids.tolist(), supervised.tolist()
    if False not in trained or not trained[-1]:
        return None
    start = len(tokens) - trained[::-1].index(False)
    return Question(sample, tokens[:start], tokens[start:-1], tokens[-1])


def questions_of(rows: PackedRows, count: int) -> list[Question]:
    """At most so many, spread evenly over the held-out samples."""
    samples = np.sort(rows.samples)
    picked = samples[np.arange(min(count, len(samples))) * len(samples) // max(1, min(count, len(samples)))]
    found = [question_of(int(sample), *rows.store.tokens(int(sample))) for sample in picked]
    return [question for question in found if question]
