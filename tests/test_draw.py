"""What an epoch draws is a pure function of (seed, epoch), and a run that draws resumes to the same bits."""

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dataset.epoch_rows import DrawnRows, EpochDraw
from dataset.packing import plan_rows
from dataset.rows import collate
from tests.small_world import KillAtCall, result_of, train, write_rows

PARTS = [np.arange(0, 100), np.arange(100, 150), np.arange(150, 160)]
LENGTHS = np.tile(np.arange(5, 25), 8)


def draw(**options) -> EpochDraw:
    return EpochDraw(PARTS, LENGTHS, 64, **{"seed": 3, **options})


def test_an_epoch_has_the_wanted_files_and_shares_of_them():
    drawing = draw(files_per_epoch=2, file_fraction=0.2)
    chosen = Counter()
    for epoch in range(30):
        samples = drawing(epoch)[1]
        counts = [int(np.isin(part, samples).sum()) for part in PARTS]
        assert sorted(counts) in ([0, 10, 20], [0, 2, 20], [0, 2, 10])
        assert len(samples) == len(set(samples.tolist())) == sum(counts)
        assert drawing.num_rows(epoch) == plan_rows(LENGTHS[samples], 64).num_rows
        chosen.update(np.flatnonzero(counts).tolist())
    assert len(chosen) == 3 and min(chosen.values()) > 10  # every file comes up
    assert not np.array_equal(drawing(0)[1], drawing(1)[1])
    assert np.array_equal(drawing(1)[1], draw(files_per_epoch=2, file_fraction=0.2)(1)[1])
    assert not np.array_equal(drawing(1)[1], draw(files_per_epoch=2, file_fraction=0.2, seed=4)(1)[1])


def test_without_a_draw_every_epoch_is_the_same():
    assert not draw().varies
    assert not draw(files_per_epoch=3).varies
    assert np.array_equal(draw()(0)[1], draw()(5)[1])


def rows_of(drawing: EpochDraw, epoch: int) -> set[tuple[int, ...]]:
    plan, samples = drawing(epoch)
    return {tuple(sorted(row.tolist())) for row in np.split(samples[plan.samples], plan.offsets[1:-1])}


def test_laying_anew_keeps_samples_and_row_lengths_and_changes_neighbours():
    drawing = draw(repack=True)
    first, second = rows_of(drawing, 0), rows_of(drawing, 1)
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(160))
    assert len(first & second) < len(first) / 4
    assert rows_of(drawing, 1) == second
    assert sorted(drawing(0)[0].row_lengths) == sorted(drawing(1)[0].row_lengths)
    assert drawing.num_rows(0) == drawing.num_rows(7) == len(first)


def test_the_fingerprint_knows_what_is_drawn():
    options = [{}, {"repack": True}, {"files_per_epoch": 2}, {"file_fraction": 0.5}]
    assert len({draw(**each).fingerprint for each in options}) == 4


class Store:
    """Samples that say their number."""

    num_samples = 160

    def tokens(self, sample):
        return np.full(LENGTHS[sample], sample), np.ones(LENGTHS[sample], dtype=bool)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_worker_processes_follow_the_epoch(workers):
    rows = DrawnRows(Store(), draw(files_per_epoch=2, file_fraction=0.3, repack=True))  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_sampler=(batch := []), collate_fn=collate, **workers)
    for epoch in (0, 1, 4):
        rows.set_epoch(epoch)
        assert len(rows) == rows.rows_of(epoch)
        batch[:] = [[row] for row in range(len(rows))]
        seen = [sample for each in loader for sample in each["sample_ids"]]
        assert sorted(seen) == sorted(draw(files_per_epoch=2, file_fraction=0.3, repack=True)(epoch)[1].tolist())


def test_a_run_that_draws_files_resumes_to_the_same_bits(tmp_path):
    paths = [write_rows(tmp_path / f"{i}.jsonl", count, seed=i) for i, count in enumerate((40, 24, 8))]
    flags = {
        "data_path": ",".join(map(str, paths)), "epochs": 3, "files_per_epoch": 2, "file_fraction": 0.5, "repack": 1,
        "save_interval": "4",
    }  # fmt: skip
    assert train(2, tmp_path / "whole", **flags) == [0, 0]
    whole = result_of(tmp_path / "whole")
    ends = [record["step"] for record in whole["records"] if record["kind"] == "epoch"]
    assert len(ends) == 3 and len(set(np.diff([0, *ends]).tolist())) > 1  # epochs of different sizes
    assert train(2, tmp_path / "cut", wrap_objective=KillAtCall(ends[1] + 2), **flags)[0] == -9
    assert train(2, tmp_path / "cut", from_resume="1", num_workers=1, persistent_workers=True, **flags) == [0, 0]
    assert result_of(tmp_path / "cut") == whole
    assert train(2, tmp_path / "cut", from_resume="1", **{**flags, "file_fraction": 0.6, "epochs": 4})[0] == 2
    assert "--allow_change data" in (tmp_path / "cut.rank0.log").read_text()
