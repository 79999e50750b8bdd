"""Every sample exactly once per epoch, whatever the number of processes and wherever it changes."""

import json
from collections import Counter

import pytest

from tests.small_world import log_of, result_of, resume_from, train, write_rows
from trainer_utils import RowSampler, SkipBatchSampler
from training.schedule.learning_rate import LRSchedule, lr_factor
from training.schedule.plan import micro_batches_per_step


def ranks_of(num_rows, world_size, window_rows, batch_size, epoch=0, rows_done=0, seed=0):
    """What each rank gets: a list of micro-batches of row numbers."""
    micro_batches = micro_batches_per_step(window_rows, world_size, batch_size)
    ranks = []
    for rank in range(world_size):
        slots = micro_batches * batch_size
        sampler = RowSampler(
            num_rows, rank=rank, world_size=world_size, window_rows=window_rows, slots=slots, seed=seed
        )
        whole_windows = sampler.begin(epoch, num_rows, rows_done)
        ranks.append(list(SkipBatchSampler(sampler, batch_size, whole_windows * micro_batches)))
    return ranks


def flat(ranks):
    return [row for batches in ranks for batch in batches for row in batch if row >= 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 11, 12, 13, 60])
@pytest.mark.parametrize(("window_rows", "batch_size"), [(12, 1), (12, 2), (6, 3), (5, 2)])
def test_exactly_once_with_equal_shares(world_size, num_rows, window_rows, batch_size):
    ranks = ranks_of(num_rows, world_size, window_rows, batch_size)
    assert sorted(flat(ranks)) == list(range(num_rows))
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes part in every exchange"
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(world_size):
    def steps(world):
        micro_batches = micro_batches_per_step(12, world, 1)
        ranks = ranks_of(50, world, 12, 1)
        count = len(ranks[0]) // micro_batches
        return [
            sorted(flat([batches[s * micro_batches : (s + 1) * micro_batches] for batches in ranks]))
            for s in range(count)
        ]

    assert steps(world_size) == steps(1)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    first = flat(ranks_of(50, 1, 10, 1))
    assert first == flat(ranks_of(50, 1, 10, 1))
    assert first != flat(ranks_of(50, 1, 10, 1, epoch=1))
    assert first != flat(ranks_of(50, 1, 10, 1, seed=1))
    # seed + epoch, as DistributedSampler has it, would give the same order here
    assert flat(ranks_of(50, 1, 10, 1, epoch=1)) != flat(ranks_of(50, 1, 10, 1, seed=1))
    assert flat(ranks_of(10, 1, 10, 1)) == [6, 8, 3, 1, 9, 4, 2, 0, 7, 5], "another order would break old checkpoints"


@pytest.mark.parametrize("new", [(1, 12, 1), (2, 12, 2), (3, 12, 4), (2, 8, 1), (3, 5, 1)])
def test_a_change_in_mid_epoch_repeats_and_leaves_out_nothing(new):
    world_size, window_rows, batch_size = new
    num_rows, steps_done = 50, 2
    micro_batches = micro_batches_per_step(12, 2, 1)
    before = [batches[: steps_done * micro_batches] for batches in ranks_of(num_rows, 2, 12, 1)]
    after = ranks_of(num_rows, world_size, window_rows, batch_size, rows_done=steps_done * 12)
    assert sorted(flat(before) + flat(after)) == list(range(num_rows))


def test_skipping_costs_exactly_the_named_batches():
    assert list(SkipBatchSampler(range(7), 2)) == [[0, 1], [2, 3], [4, 5], [6]]
    assert list(SkipBatchSampler(range(7), 2, 2)) == [[4, 5], [6]]
    assert list(SkipBatchSampler(range(7), 2, 3)) == [[6]]
    assert list(SkipBatchSampler(range(7), 2, 4)) == []
    assert [len(SkipBatchSampler(range(7), 2, skip)) for skip in range(6)] == [4, 3, 2, 1, 0, 0]


class Witness:
    """Writes down which samples each forward pass holds."""

    def __init__(self, directory):
        self.directory = directory

    def __call__(self, objective, rank):
        path = self.directory / f"{rank}.jsonl"

        def watched(model, batch):
            if model.training:
                with open(path, "a") as file:
                    file.write(json.dumps(batch["sample_ids"]) + "\n")
            return objective(model, batch)

        return watched


def samples_seen(directory):
    lines = [line for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]
    return Counter(sample for line in lines for sample in json.loads(line) if sample >= 0)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, {"batch_size": 1}), (3, {"batch_size": 1})),
        ((3, {"batch_size": 1}), (1, {"batch_size": 2})),
        ((1, {"batch_size": 3}), (2, {"batch_size": 4, "accumulation_steps": 2})),
    ],
)
def test_a_run_resumed_with_other_processes_or_batches_trains_each_sample_once_per_epoch(tmp_path, first, then):
    flags = {"data_path": str(write_rows(tmp_path / "rows.jsonl")), "epochs": 2}
    (world, sizes), (new_world, new_sizes) = first, then
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    assert train(world, tmp_path / "whole", **flags | sizes) == [0] * world
    kept = 2
    cut = resume_from(tmp_path / "whole", kept, tmp_path / "cut")

    # what the first `kept` steps saw
    witness = Witness(tmp_path / "before")
    assert train(world, tmp_path / "short", wrap_objective=witness, max_steps=kept, **flags | sizes) == [0] * world
    witness = Witness(tmp_path / "after")
    codes = train(new_world, cut, wrap_objective=witness, from_resume="1", **flags | new_sizes)
    assert codes == [0] * new_world, log_of(cut)
    seen = samples_seen(tmp_path / "before") + samples_seen(tmp_path / "after")
    # the priming pass and held-out data show no sample; 24 conversations in 2 epochs
    assert seen == Counter(dict.fromkeys(range(24), 2))

    # the steps, the learning rates and (but for the last digits) the losses are those of the uninterrupted run
    def steps(run):
        records = [r for r in result_of(run)["records"] if r["kind"] == "train"]
        return [(r["step"], r["train/learning_rate"], r["train/supervised_tokens"]) for r in records]

    assert steps(cut) == steps(tmp_path / "whole")


def test_another_number_of_rows_per_step_goes_on_from_the_same_share_of_the_run(tmp_path):
    flags = {"data_path": str(write_rows(tmp_path / "rows.jsonl")), "epochs": 3, "batch_size": 1}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    assert train(1, tmp_path / "whole", **flags) == [0]
    num_rows = sum(1 for r in result_of(tmp_path / "whole")["records"] if r["kind"] == "train") // 3
    kept = num_rows + 3
    cut = resume_from(tmp_path / "whole", kept, tmp_path / "cut")
    witness = Witness(tmp_path / "before")
    assert train(1, tmp_path / "short", wrap_objective=witness, max_steps=kept, **flags) == [0]

    change = {"global_batch_size": 4, "from_resume": "1"}
    assert train(1, cut, **flags, **change) == [2], "only when it is named"
    witness = Witness(tmp_path / "after")
    assert train(1, cut, wrap_objective=witness, allow_change="global_batch_size", **flags, **change) == [0], log_of(
        cut
    )
    seen = samples_seen(tmp_path / "before") + samples_seen(tmp_path / "after")
    assert seen == Counter(dict.fromkeys(range(24), 3))

    records = result_of(cut)["records"]
    rates = {r["step"]: r["train/learning_rate"] for r in records if r["kind"] == "train" and r["step"] > kept}
    steps_per_epoch = -(-num_rows // 4)
    left = -(-(num_rows - 3) // 4) + steps_per_epoch
    total = 3 * steps_per_epoch
    assert sorted(rates) == list(range(kept + 1, kept + 1 + left))
    expected = [0.01 * lr_factor(LRSchedule("cosine"), s, total) for s in range(total - left + 1, total + 1)]
    assert list(rates.values()) == expected
    assert [r["step"] for r in records if r["kind"] == "epoch"][-1] == kept + left
