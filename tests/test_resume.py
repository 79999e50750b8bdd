"""The promise that matters most: a run that was cut off and resumed ends with the bits of the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.verify.checks import kill
from tests.small_world import (
    TINY,
    KillAtCall,
    log_of,
    records_of,
    result_of,
    resume_from,
    sign_again,
    train,
    without_events,
    write_rows,
)

ROOT = Path(__file__).resolve().parent.parent


# Every value of every column meets several of the others; dropout is on everywhere.
MATRIX = [
    (1, "float32", 1),
    (1, "bfloat16", 3),
    (1, "float16", 1),
    (2, "float32", 3),
    (2, "bfloat16", 1),
    (2, "float16", 3),
    (3, "float32", 1),
    (3, "float16", 1),
    (4, "float32", 1),
    (4, "bfloat16", 3),
]
FSDP = [
    (2, "float32", 3),
    (2, "bfloat16", 1),
    (3, "float32", 1),
    (3, "float16", 3),
    (4, "float32", 1),
]
LONG_LANE = {
    "ddp": [(1, "float16", 1), (2, "bfloat16", 1), (3, "float16", 1), (4, "bfloat16", 3)],
    "fsdp": [(2, "float32", 3), (3, "float16", 3)],
}


@pytest.mark.parametrize(
    ("world_size", "dtype", "accumulation", "strategy"),
    [
        pytest.param(*row, strategy, marks=[pytest.mark.slow] if row in LONG_LANE[strategy] else [])
        for strategy, table in (("ddp", MATRIX), ("fsdp", FSDP))
        for row in table
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, rows, world_size, dtype, accumulation, strategy):
    kill_and_resume(tmp_path, rows, world_size, dtype, accumulation, strategy)


@pytest.mark.parametrize(
    ("world_size", "dtype", "accumulation", "strategy"),
    [
        pytest.param(1, "bfloat16", 1, "ddp", marks=pytest.mark.slow),
        (2, "float32", 3, "ddp"),
        pytest.param(3, "float32", 1, "ddp", marks=pytest.mark.slow),
        (3, "bfloat16", 1, "fsdp"),
    ],
)
def test_a_mixture_of_experts_ends_with_the_same_bits(tmp_path, rows, world_size, dtype, accumulation, strategy):
    shape = {"use_moe": True, "gradient_checkpointing": accumulation > 1}
    kill_and_resume(tmp_path, rows, world_size, dtype, accumulation, strategy, **shape)
    (log,) = records_of(tmp_path / "cut", "train")[-1:]
    assert log["train/weight_aux"] == 0.01 and log["train/loss_aux"] > 1 and log["train/max_expert_share"] > 1 / 8


def kill_and_resume(tmp_path, rows, world_size, dtype, accumulation, strategy, **more):
    if accumulation > 1:  # so that the checkpoint lies inside an epoch there too
        rows = write_rows(tmp_path / "rows.jsonl", 96)
    flags = {"data_path": str(rows), "val_data_path": str(rows), "dtype": dtype, "accumulation_steps": accumulation}
    flags |= {"save_interval": "2", "batch_size": 2 if world_size == 1 else 1, "epochs": 3 if accumulation == 1 else 2}
    flags |= {"strategy": strategy, **more}
    assert train(world_size, tmp_path / "whole", **flags) == [0] * world_size, log_of(tmp_path / "whole")
    kill = KillAtCall(call=3 * accumulation + 2, victim=world_size - 1)  # after three steps or four, one checkpoint
    codes = train(world_size, tmp_path / "cut", wrap_objective=kill, **flags)
    assert codes[world_size - 1] == -signal.SIGKILL
    assert not (tmp_path / "cut" / "final").exists()
    assert train(world_size, tmp_path / "cut", from_resume="1", **flags) == [0] * world_size, log_of(tmp_path / "cut")
    assert "resumed from" in log_of(tmp_path / "cut")
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")


def test_resume_is_exact_from_every_checkpoint_and_another_seed_differs(tmp_path, rows):
    """First step, mid-epoch, the exact end of an epoch, the last step."""
    flags = {"data_path": str(rows), "batch_size": 2}
    assert train(1, tmp_path / "whole", **flags) == [0]
    expected = result_of(tmp_path / "whole")
    steps = sorted(int(p.name.removeprefix("step-")) for p in (tmp_path / "whole" / "checkpoints").iterdir())
    epoch_ends = [r["step"] for r in expected["records"] if r["kind"] == "epoch"]
    assert steps == list(range(1, epoch_ends[-1] + 1)) and len(epoch_ends) == 2 and epoch_ends[0] in steps
    for step in steps:
        copy = resume_from(tmp_path / "whole", step, tmp_path / f"from-{step}")
        assert train(1, copy, from_resume="1", **flags) == [0], log_of(copy)
        assert result_of(copy) == expected, f"resumed from step {step}"

    assert train(1, tmp_path / "other", **flags | {"seed": 8}) == [0]
    assert result_of(tmp_path / "other")["final"] != expected["final"]


def test_a_lost_optimizer_would_be_noticed(tmp_path, rows):
    """Negative control: the comparison sees a resume that forgets the optimizer's memory."""
    from safetensors.torch import load_file, save_file

    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "whole", **flags) == [0]
    copy = resume_from(tmp_path / "whole", 3, tmp_path / "copy")
    checkpoint = copy / "checkpoints" / "step-00000003"
    file = checkpoint / "optimizer-00001-of-00001.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    sign_again(checkpoint)
    assert train(1, copy, from_resume="1", **flags) == [0]
    assert result_of(copy)["final"] != result_of(tmp_path / "whole")["final"]


def test_resuming_a_finished_run_changes_nothing(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]

    def files():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}

    before = files()
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0]
    assert "nothing to do" in log_of(tmp_path / "run")
    assert files() == before


def test_a_run_cut_off_before_its_export_is_finished_by_a_resume(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]
    expected = result_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0]
    assert result_of(tmp_path / "run") == expected


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "whole", **flags) == [0]
    copy = resume_from(tmp_path / "whole", 5, tmp_path / "copy")
    file = copy / "checkpoints" / "step-00000005" / "model-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert train(1, copy, from_resume="1", **flags) == [0]
    assert "step 5 is damaged" in log_of(copy) and "step-00000004" in log_of(copy)
    assert result_of(copy) == result_of(tmp_path / "whole")


def test_a_directory_that_holds_a_run_is_not_written_over(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]
    first = result_of(tmp_path / "run")
    assert train(1, tmp_path / "run", **flags) == [2]
    assert "--from_resume 1" in log_of(tmp_path / "run") and "--overwrite 1" in log_of(tmp_path / "run")
    assert result_of(tmp_path / "run") == first
    assert train(1, tmp_path / "run", overwrite=True, **flags) == [0]
    assert result_of(tmp_path / "run") == first


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"learning_rate": 0.02}, "schedule"),
        ({"epochs": 3}, "schedule"),
        ({"weight_decay": 0.5}, "optimizer"),
        ({"dtype": "bfloat16"}, "precision"),
        ({"max_seq_len": 128}, "data"),
        ({"global_batch_size": 2}, "global_batch_size"),
        ({"num_attention_heads": 4}, "model"),
    ],
)
def test_what_decides_the_result_may_not_change_unsaid(tmp_path, rows, change, name):
    flags = {"data_path": str(rows), "max_steps": None}
    assert train(1, tmp_path / "run", **flags) == [0]
    resume_from(tmp_path / "run", 3, tmp_path / "copy")
    assert train(1, tmp_path / "copy", from_resume="1", **flags | change) == [2]
    assert f"{name}: the checkpoint has" in log_of(tmp_path / "copy")


def test_more_epochs_go_on_when_the_change_is_named(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]
    assert train(1, tmp_path / "run", from_resume="1", allow_change="schedule", **flags | {"epochs": 3}) == [0]
    epochs = [r["epoch"] for r in result_of(tmp_path / "run")["records"] if r["kind"] == "epoch"]
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize(
    "workers",
    [
        {"num_workers": 2, "persistent_workers": True},
        pytest.param({"num_workers": 1, "prefetch_factor": 4}, marks=pytest.mark.slow),
    ],
)
def test_workers_do_not_change_the_result(tmp_path, rows, workers):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "plain", **flags) == [0]
    resume_from(tmp_path / "plain", 4, tmp_path / "workers")
    assert train(1, tmp_path / "workers", from_resume="1", **flags, **workers) == [0], log_of(tmp_path / "workers")
    assert result_of(tmp_path / "workers") == result_of(tmp_path / "plain")


def test_a_branch_from_an_older_checkpoint_keeps_its_own_checkpoints(tmp_path, rows):
    flags = {"data_path": str(rows), "epochs": 2}
    assert train(1, tmp_path / "run", **flags) == [0]
    expected = result_of(tmp_path / "run")["final"]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert train(1, tmp_path / "run", **flags | {"from_resume": checkpoint, "keep_last": 2}) == [0]
    assert "is set aside" in log_of(tmp_path / "run")
    assert result_of(tmp_path / "run")["final"] == expected

    # into another directory it is a new run, and not over a run that is there
    moved = str(tmp_path / "run" / "checkpoints" / "aside-step-00000004")
    assert train(1, tmp_path / "fork", **flags | {"from_resume": moved}) == [0], log_of(tmp_path / "fork")
    assert result_of(tmp_path / "fork")["final"] == expected
    assert train(1, tmp_path / "fork", **flags | {"from_resume": moved}) == [2]
    assert "already holds a run" in log_of(tmp_path / "fork")


def test_a_result_without_checkpoints_is_not_replaced_by_a_resume(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [2]
    assert "--from_weight" in log_of(tmp_path / "run") and (tmp_path / "run" / "final").exists()


def test_overwriting_deletes_nothing_before_the_new_run_is_sure_to_start(tmp_path, rows):
    flags = {"data_path": str(rows)}
    assert train(1, tmp_path / "run", **flags) == [0]
    for wrong, code in (({"dry_run": True}, 0), ({"data_path": "missing.jsonl"}, 65), ({"hidden_size": 17}, 2)):
        assert train(1, tmp_path / "run", **flags | wrong | {"overwrite": True}) == [code]
        assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_steps_counted_by_max_steps_are_all_done_after_a_change_of_their_rows(tmp_path, rows):
    flags = {"data_path": str(rows), "max_steps": 9}
    assert train(1, tmp_path / "run", **flags | {"global_batch_size": 4, "batch_size": 4}) == [0]
    copy = resume_from(tmp_path / "run", 5, tmp_path / "copy")
    change = {"global_batch_size": 1, "allow_change": "global_batch_size", "from_resume": "1"}
    assert train(1, copy, **flags | change) == [0], log_of(copy)
    steps = [r["step"] for r in result_of(copy)["records"] if r["kind"] == "train"]
    assert steps == list(range(1, 10))


def command(rows: Path, save_dir: Path, *more: str) -> list[str]:
    flags = {**TINY, "data_path": rows, "save_dir": save_dir, "cache_dir": save_dir.parent / "cache", "epochs": 20}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, "train_full_sft.py", *words, *more]


@pytest.mark.slow
def test_the_real_torchrun_is_killed_and_resumed(tmp_path, rows):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(rows, tmp_path / "whole"), check=True, timeout=120, **quiet)

    process = subprocess.Popen(command(rows, tmp_path / "cut"), **quiet)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cut" / "checkpoints").glob("step-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)  # with the ranks, which are in sessions of their own and would go on without torchrun
    left = len(list((tmp_path / "cut" / "checkpoints").glob("step-*")))
    assert 5 <= left < len(list((tmp_path / "whole" / "checkpoints").glob("step-*")))

    subprocess.run(command(rows, tmp_path / "cut", "--from_resume", "1"), check=True, timeout=120, **quiet)
    assert without_events(tmp_path / "cut") == without_events(tmp_path / "whole")
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "completed" and state["step"] == state["total_steps"]


def test_a_branch_from_a_finished_run_has_all_its_weights(tmp_path, rows):
    flags = {"data_path": str(rows), "epochs": 1}
    assert train(1, tmp_path / "run", **flags) == [0]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert train(1, tmp_path / "branch", from_resume=str(newest), **flags) == [0], log_of(tmp_path / "branch")
    assert result_of(tmp_path / "branch")["final"] == result_of(tmp_path / "run")["final"]
    assert (tmp_path / "branch" / "checkpoints" / newest.name).is_dir()


class OtherSeed:
    """Rank 1 is started with another seed, as on a node whose command line was changed."""

    def __call__(self, objective, rank):
        import train_full_sft

        if rank == 1:
            original = train_full_sft.identity_of
            train_full_sft.identity_of = lambda *args: {**original(*args), "seed": 99}
        return objective


def test_ranks_that_differ_in_data_or_flags_are_refused(tmp_path, rows):
    codes = train(2, tmp_path / "run", data_path=str(rows), wrap_objective=OtherSeed())
    assert 2 in codes and 0 not in codes
    assert "the processes differ in data or flags" in log_of(tmp_path / "run", 0) + log_of(tmp_path / "run", 1)
