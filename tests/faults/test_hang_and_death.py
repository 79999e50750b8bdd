"""A rank that stops, hangs, dies or errs: the whole job ends soon, says why, and leaves nobody behind."""

import os
import re
import signal
import time

import pytest

from tests.faults.launched import Launched
from tests.small_world import log_of, train

ENDLESS = {"epochs": 4000, "save_interval": "50", "keep_last": 2}


@pytest.mark.slow  # torchrun takes 30 s to kill a process that does not answer
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_stopped_rank_is_a_hang_that_ends_with_the_stacks_of_the_others(tmp_path, rows, strategy):
    limit = 3
    flags = {"data_path": rows, "strategy": strategy, "group_timeout_seconds": limit, **ENDLESS}
    with Launched(2, tmp_path / "run", **flags) as job:
        job.wait_for_step(3)
        started = time.monotonic()
        os.kill(job.ranks()[1], signal.SIGSTOP)
        job.exit_code(limit + 35)
        print(f"{strategy}: gone {time.monotonic() - started:.1f} s after the rank was stopped, limit {limit} s")
        assert "hang: this process got no further" in job.log
        assert "train_step" in job.log or "sum_ints" in job.log, "the stack of the rank that waits"
        assert re.search(r"exitcode\s*: 76", job.log)
        assert job.state()["status"] == "failed" and "hang" in job.state()["exit_reason"]


class SleepAt:
    """One rank does not come back from its n-th training pass."""

    def __init__(self, call, victim):
        self.call, self.victim = call, victim

    def __call__(self, objective, rank):
        calls = 0

        def sleepy(model, batch):
            nonlocal calls
            calls += 1
            while rank == self.victim and calls >= self.call:
                time.sleep(0.1)
            return objective(model, batch)

        return sleepy


def test_all_ranks_of_a_hang_write_their_stacks_and_end_with_76(tmp_path, rows):
    flags = {"data_path": str(rows), "group_timeout_seconds": 2}
    codes = train(2, tmp_path / "run", wrap_objective=SleepAt(call=4, victim=1), **flags)
    assert 76 in codes
    assert "sum_ints" in log_of(tmp_path / "run", 0) or "backward" in log_of(tmp_path / "run", 0)
    assert "sleepy" in log_of(tmp_path / "run", 1)


@pytest.mark.slow
def test_before_the_first_step_the_limit_is_longer(tmp_path, rows):
    started = time.monotonic()
    flags = {"data_path": str(rows), "group_timeout_seconds": 4}
    assert train(1, tmp_path / "run", wrap_objective=SleepAt(call=1, victim=0), **flags) == [76]
    assert 10 <= time.monotonic() - started < 30


class Slow:
    """Every micro-batch takes more than half of the limit."""

    def __call__(self, objective, rank):
        def slow(model, batch):
            time.sleep(1.2)
            return objective(model, batch)

        return slow


def test_a_slow_run_is_no_hang(tmp_path, rows):
    flags = {"data_path": str(rows), "max_steps": 2, "accumulation_steps": 3, "group_timeout_seconds": 2}
    assert train(1, tmp_path / "run", wrap_objective=Slow(), **flags) == [0]


@pytest.mark.parametrize(
    ("strategy", "victim"), [("ddp", 0), pytest.param("ddp", 1, marks=pytest.mark.slow), ("fsdp", 1)]
)
def test_when_a_rank_is_killed_the_job_is_gone_in_ten_seconds(tmp_path, rows, strategy, victim):
    flags = {"data_path": rows, "strategy": strategy, "num_workers": int(victim == 1), **ENDLESS}
    with Launched(2, tmp_path / "run", **flags) as job:
        job.wait_for_step(3)
        started = time.monotonic()
        os.kill(job.ranks()[victim], signal.SIGKILL)
        job.exit_code(10)
        print(f"{strategy}, rank {victim}: gone after {time.monotonic() - started:.1f} s")
        root_cause = job.log.rindex("Root Cause")
        assert "exitcode  : -9" in job.log[root_cause:], "torchrun says last who went first"
        assert "stopped: another process of the job is gone" in job.log
        assert "Traceback" not in job.log[: job.log.index("Root Cause")].split("is gone, see its message")[0][-3000:]


class RaiseAt:
    """An error of one rank in its n-th pass, of training or of validation, or in a save."""

    def __init__(self, call, victim, moment):
        self.call, self.victim, self.moment = call, victim, moment

    def __call__(self, objective, rank):
        calls = 0

        def count(is_it):
            nonlocal calls
            calls += is_it
            if is_it and calls == self.call and rank == self.victim:
                raise LookupError("a bug of this rank")

        def faulty(model, batch):
            count(self.moment == ("step" if model.training else "validation"))
            terms = objective(model, batch)
            if self.moment == "backward" and terms["ce"].requires_grad:
                terms["ce"].register_hook(lambda gradient: count(True))
            return terms

        return faulty


@pytest.mark.parametrize(
    ("moment", "strategy"), [("step", "ddp"), ("backward", "fsdp"), ("validation", "fsdp"), ("backward", "ddp")]
)
def test_an_error_of_one_rank_ends_all(tmp_path, rows, moment, strategy):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "strategy": strategy}
    codes = train(2, tmp_path / "run", wrap_objective=RaiseAt(4, 1, moment), **flags)
    assert codes[1] == 70 and "a bug of this rank" in log_of(tmp_path / "run", 1)
    assert codes[0] not in (0, None)
