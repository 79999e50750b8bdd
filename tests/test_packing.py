"""A plan holds every sample exactly once, no row overflows, and the rows are nearly full."""

import numpy as np
import pytest

from dataset.packing import RowPlan, plan_rows


def rows_of(plan: RowPlan) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.samples, plan.offsets[1:-1])]


def problems(plan: RowPlan, lengths: np.ndarray, max_seq_len: int) -> list[str]:
    """What is wrong with a plan; empty when it is right."""
    found = []
    if sorted(plan.samples.tolist()) != list(range(len(lengths))):
        found.append("not every sample exactly once")
    rows = rows_of(plan)
    positions = [int((lengths[row] - 1).sum()) for row in rows]
    if max(positions) > max_seq_len:
        found.append("a row overflows")
    if not all(rows) or any(row != sorted(row) for row in rows) or rows != sorted(rows):
        found.append("rows out of order")
    if positions != plan.row_lengths.tolist():
        found.append("row lengths are wrong")
    if plan.efficiency != sum(positions) / (len(rows) * max_seq_len):
        found.append("efficiency is wrong")
    return found


def test_a_small_plan_is_known():
    plan = plan_rows(np.array([4, 7, 9, 3, 5, 2]), 8)  # positions 3, 6, 8, 2, 4, 1
    assert rows_of(plan) == [[0, 4, 5], [1, 3], [2]]
    assert (plan.num_rows, plan.num_samples, plan.efficiency) == (3, 6, 1.0)
    assert plan.row_lengths.tolist() == [8, 8, 8]
    assert plan.fingerprint == "2fdf2c0d698368402b928814ad48a9519ea61bcf47fe033d51d3295e9c6a75b4"


@pytest.mark.parametrize("seed", range(60))
def test_random_lengths_are_packed_exactly_once_in_any_order(seed):
    rng = np.random.default_rng(seed)
    max_seq_len = int(rng.integers(1, 300))
    lengths = rng.integers(2, max_seq_len + 2, size=int(rng.integers(1, 400)))
    if seed % 3 == 0:
        lengths = np.minimum(2 + rng.geometric(0.05, size=len(lengths)), max_seq_len + 1)
    plan = plan_rows(lengths, max_seq_len)
    assert problems(plan, lengths, max_seq_len) == []
    again = plan_rows(lengths.astype(np.int32).copy(), max_seq_len)
    assert again.fingerprint == plan.fingerprint
    assert np.array_equal(again.samples, plan.samples)

    order = rng.permutation(len(lengths))
    shuffled = plan_rows(lengths[order], max_seq_len)
    contents = sorted(sorted(lengths[row].tolist()) for row in rows_of(plan))
    assert sorted(sorted(lengths[order][row].tolist()) for row in rows_of(shuffled)) == contents


def test_the_check_itself_sees_wrong_plans():
    lengths = np.array([4, 7, 9, 3, 5, 2])
    good = plan_rows(lengths, 8)
    twice = RowPlan(good.offsets, good.samples[[0, 0, 2, 3, 4, 5]], "", good.row_lengths, 8)
    assert "not every sample exactly once" in problems(twice, lengths, 8)
    assert "a row overflows" in problems(good, lengths + 1, 8)
    reordered = RowPlan(good.offsets, good.samples[[1, 0, 2, 3, 4, 5]], "", good.row_lengths, 8)
    assert "rows out of order" in problems(reordered, lengths, 8)
    assert "efficiency is wrong" in problems(RowPlan(good.offsets, good.samples, "", good.row_lengths, 16), lengths, 8)


def test_the_fingerprint_knows_lengths_room_and_order():
    lengths = np.array([4, 7, 9, 3, 5, 2])
    prints = {plan_rows(lengths, 8).fingerprint, plan_rows(lengths, 9).fingerprint}
    prints |= {plan_rows(lengths[::-1], 8).fingerprint, plan_rows(lengths[:-1], 8).fingerprint}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 10, 11], r"sample 1 has 10 tokens, more than max_seq_len=8 \+ 1 \(2 such samples\)"),
        ([3, 1], "sample 1 has 1 tokens, too few"),
        ([], "no sample"),
    ],
)
def test_what_cannot_be_packed_is_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(np.array(lengths, dtype=np.int64), 8)
    assert plan_rows(np.array([9]), 8).num_rows == 1  # exactly full


def test_rows_are_nearly_full_where_lengths_lie_close_together():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 0.3, 8000).astype(np.int64), 2, 1025)
    assert plan_rows(lengths, 1024).efficiency > 0.985
    spread = np.clip(rng.lognormal(5.3, 0.8, 8000).astype(np.int64), 2, 1025)
    assert plan_rows(spread, 1024).efficiency > 0.995


@pytest.mark.parametrize(("samples", "max_seq_len"), [(1_000_000, 1024), (100_000, 32768)])
def test_large_plans_are_tight_and_keep_every_sample(samples, max_seq_len):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 1.0, samples).astype(np.int64), 2, max_seq_len + 1)
    plan = plan_rows(lengths, max_seq_len)
    assert plan.efficiency > 0.99
    assert np.array_equal(np.sort(plan.samples), np.arange(samples))  # none is lost
