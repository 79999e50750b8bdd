"""Other processes, another strategy, another sharing of a step: the run goes on as if nothing had changed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.small_world import log_of, result_of, resume_from, train, write_rows
from tests.test_order import Witness, samples_seen


class InFloat64:
    """The run computes in float64, in which a difference of 1e-12 is none of rounding."""

    def __call__(self, objective, rank):
        import train_full_sft

        choose_model = train_full_sft.choose_model
        train_full_sft.choose_model = lambda *args, **kwargs: choose_model(*args, **kwargs).double()
        train_full_sft.export_model = lambda *args, **kwargs: None  # the checkpoint is what is compared
        return objective


def weights_of(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    parts = [load_file(path) for path in sorted(newest.glob("model-*.safetensors"))]
    merged: dict[str, list[torch.Tensor]] = {}
    for part in parts:  # shards of a tensor lie in the order of the ranks, one after the other along the first axis
        for name, tensor in part.items():
            merged.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in merged.items()}


PATHS = [
    [(2, "ddp", 1), (1, "ddp", 1), (2, "ddp", 1)],
    [(1, "ddp", 1), (2, "fsdp", 1), (1, "ddp", 1)],
    [(2, "fsdp", 1), (3, "fsdp", 1), (2, "ddp", 1)],
    [(2, "ddp", 2), (2, "fsdp", 1), (4, "fsdp", 1)],
]


@pytest.mark.parametrize(
    "path",
    [*PATHS[1:3], *(pytest.param(path, marks=pytest.mark.slow) for path in (PATHS[0], PATHS[3]))],
    ids=lambda path: " ".join(f"{world}x{name}" for world, name, _ in path),
)
def test_weights_are_those_of_the_uninterrupted_run(tmp_path, rows, path):
    """To 1e-12 in float64: the rows of each step, their order and the learning rates never change."""
    flags = {"data_path": str(rows), "dropout": 0.0, "global_batch_size": 4, "save_interval": "2", "epochs": 3}
    assert train(1, tmp_path / "whole", wrap_objective=InFloat64(), **flags) == [0], log_of(tmp_path / "whole")
    for part, (world_size, strategy, batch_size) in enumerate(path):
        flags |= {"strategy": strategy, "batch_size": batch_size}
        wrapper = InFloat64() if part == 2 else CutAfter(2 * part + 2)
        codes = train(world_size, tmp_path / "run", from_resume="1", wrap_objective=wrapper, **flags)
        assert (codes == [0] * world_size) == (part == 2), log_of(tmp_path / "run")
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert expected.keys() == found.keys() and all(tensor.dtype == torch.float64 for tensor in found.values())
    assert max((expected[name] - found[name]).abs().max().item() for name in expected) <= 1e-12


class CutAfter(InFloat64):
    """Ends all ranks after this step, as a power cut would."""

    def __init__(self, step):
        self.step = step

    def __call__(self, objective, rank):
        import os

        import train_full_sft

        super().__call__(objective, rank)
        advance = train_full_sft.LoopState.advance

        def last(state, *args):
            if state.step == self.step:
                os._exit(9)
            advance(state, *args)

        train_full_sft.LoopState.advance = last
        return objective


@pytest.mark.parametrize("count", [1, 2, 7, 11, 12, 13])
def test_few_samples_are_trained_once_each_whatever_the_numbers(tmp_path, count):
    """Around the rows of a step, 12, and fewer than there are processes; rows of one sample each."""
    data = write_rows(tmp_path / "rows.jsonl", count=count)
    flags = {"data_path": str(data), "global_batch_size": 12, "batch_size": 2, "packing": False, "epochs": 2}
    (tmp_path / "seen").mkdir()
    codes = train(3, tmp_path / "run", wrap_objective=Witness(tmp_path / "seen"), **flags)
    assert codes == [0, 0, 0], log_of(tmp_path / "run")
    assert samples_seen(tmp_path / "seen") == dict.fromkeys(range(count), 2)


def test_a_checkpoint_of_sharded_ranks_goes_on_anywhere(tmp_path, rows):
    """Bit for bit where the arithmetic is the same: the first step after the resume has the same loss everywhere."""
    flags = {"data_path": str(rows), "dropout": 0.0, "global_batch_size": 2, "epochs": 3}
    assert train(2, tmp_path / "whole", strategy="fsdp", **flags) == [0, 0], log_of(tmp_path / "whole")
    expected = [r for r in result_of(tmp_path / "whole")["records"] if r["kind"] == "train"]
    for world_size, strategy in ((1, "ddp"), (2, "ddp"), (3, "fsdp"), (2, "fsdp")):
        copy = resume_from(tmp_path / "whole", 4, tmp_path / f"{world_size}-{strategy}")
        codes = train(world_size, copy, strategy=strategy, from_resume="1", **flags)
        assert codes == [0] * world_size, log_of(copy)
        found = [r for r in result_of(copy)["records"] if r["kind"] == "train"]
        assert [r["train/learning_rate"] for r in found] == [r["train/learning_rate"] for r in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)


def test_six_generations_within_one_epoch_end_with_the_same_bits(tmp_path, rows):
    flags = {"data_path": str(rows), "epochs": 1, "num_workers": 0}
    assert train(1, tmp_path / "whole", **flags) == [0]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in range(6, 0, -1):  # each goes on from what the one before has made
        cut = resume_from(tmp_path / "run", 7 - step, tmp_path / f"generation-{step}")
        shutil.rmtree(tmp_path / "run")
        assert train(1, cut, from_resume="1", **flags) == [0], log_of(cut)
        shutil.copytree(cut, tmp_path / "run")
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
