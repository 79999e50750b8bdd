"""Signals stop all ranks between the same two steps with everything saved, wherever in the run they arrive."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.launched import Launched
from tests.small_world import log_of, train, without_events, write_rows
from training.checkpoints.manifest import verify
from training.checkpoints.store import CheckpointStore

SECONDS_TO_STOP = 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, rows):
    """Result of an undisturbed run by world size and strategy."""
    results = {}

    def result(world_size, strategy, **flags):
        key = (world_size, strategy)
        if key not in results:
            run = tmp_path_factory.mktemp("whole") / "run"
            assert train(world_size, run, strategy=strategy, **flags) == [0] * world_size, log_of(run)
            results[key] = without_events(run)
        return results[key]

    return result


class SignalAt:
    """One rank signals itself in its n-th training pass, validation pass or save; the moment is written down."""

    def __init__(self, number, moment, call, victim, note):
        self.number, self.moment, self.call, self.victim, self.note = number, moment, call, victim, note

    def __call__(self, objective, rank):
        calls = 0

        def count(is_it):
            nonlocal calls
            calls += is_it
            if is_it and calls == self.call and rank == self.victim:
                Path(self.note).write_text(str(time.time()))
                os.kill(os.getpid(), self.number)

        def watched(model, batch):
            count(self.moment == ("step" if model.training else "validation"))
            return objective(model, batch)

        if self.moment == "save":
            from training.checkpoints import store as checkpoints

            write_shard = checkpoints.write_shard

            def watched_write(path, blocks):
                count(True)
                return write_shard(path, blocks)

            checkpoints.write_shard = watched_write
        return watched


MOMENTS = [
    ("step", signal.SIGTERM, 1, "ddp", 1),
    ("step", signal.SIGHUP, 2, "fsdp", 0),
    ("step", signal.SIGINT, 2, "ddp", 1),
    ("validation", signal.SIGTERM, 2, "ddp", 0),
    ("validation", signal.SIGTERM, 2, "fsdp", 1),
    ("validation", signal.SIGINT, 1, "ddp", 0),
    ("save", signal.SIGTERM, 2, "ddp", 1),
    ("save", signal.SIGHUP, 1, "ddp", 0),
]


@pytest.mark.parametrize(("moment", "number", "world_size", "strategy", "victim"), MOMENTS)
def test_one_signal_to_one_rank_stops_all_and_a_resume_has_the_same_bits(
    tmp_path, rows, uninterrupted, moment, number, world_size, strategy, victim
):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_interval": "3", "save_interval": "4"}
    expected = uninterrupted(world_size, strategy, **flags)
    victim = min(victim, world_size - 1)
    call = {"step": 6, "validation": 3, "save": 2}[moment]
    at = SignalAt(number, moment, call, victim, str(tmp_path / "moment"))
    codes = train(world_size, tmp_path / "cut", strategy=strategy, wrap_objective=at, **flags)
    seconds = time.time() - float((tmp_path / "moment").read_text())
    code = 0 if number == signal.SIGINT else 75
    assert codes == [code] * world_size, log_of(tmp_path / "cut")
    assert seconds < SECONDS_TO_STOP
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    newest = CheckpointStore(tmp_path / "cut" / "checkpoints").steps()[-1]
    assert state["status"] == "stopped" and state["step"] == newest < expected["loop"]["step"]
    assert verify(tmp_path / "cut" / "checkpoints" / f"step-{newest:08d}")
    codes = train(world_size, tmp_path / "cut", strategy=strategy, from_resume="1", **flags)
    assert codes == [0] * world_size, log_of(tmp_path / "cut")
    assert without_events(tmp_path / "cut") == expected


def test_validation_cut_off_at_the_end_of_an_epoch_is_made_good_on_resume(tmp_path, rows):
    """Also its record, and the record of the epoch, which holds its result."""
    flags = {"data_path": str(rows), "val_data_path": str(rows), "save_interval": "500", "epochs": 3}
    assert train(1, tmp_path / "whole", **flags) == [0]
    at = SignalAt(signal.SIGTERM, "validation", 2, 0, str(tmp_path / "moment"))
    assert train(1, tmp_path / "cut", wrap_objective=at, **flags) == [75]
    (newest,) = (tmp_path / "cut" / "checkpoints").iterdir()
    assert json.loads((newest / "trainer_state.json").read_text())["loop"]["unfinished"]
    assert train(1, tmp_path / "cut", from_resume="1", **flags) == [0], log_of(tmp_path / "cut")
    assert without_events(tmp_path / "cut") == without_events(tmp_path / "whole")


def test_sigusr1_saves_and_goes_on(tmp_path, rows):
    flags = {"data_path": str(rows), "save_interval": "500"}
    at = SignalAt(signal.SIGUSR1, "step", 5, 1, str(tmp_path / "moment"))
    assert train(2, tmp_path / "run", wrap_objective=at, **flags) == [0, 0], log_of(tmp_path / "run")
    steps = CheckpointStore(tmp_path / "run" / "checkpoints").steps()
    assert len(steps) == 2 and steps[0] in (4, 5)  # asked for in step 4: the first pass primes DDP


@pytest.mark.parametrize("target", ["torchrun", "one worker", pytest.param("the group", marks=pytest.mark.slow)])
def test_a_signal_to_the_real_job_saves_in_time(tmp_path, rows, target):
    flags = {"data_path": rows, "epochs": 400, "save_interval": "5000", "num_workers": 1}
    with Launched(2, tmp_path / "run", **flags) as job:
        job.wait_for_step(5)
        ranks, started = job.ranks(), time.monotonic()
        if target == "torchrun":
            os.kill(job.process.pid, signal.SIGTERM)
        elif target == "one worker":
            os.kill(ranks[1], signal.SIGHUP)
        else:
            for pid in [job.process.pid, *job.everybody()]:
                os.kill(pid, signal.SIGINT)
        code = job.exit_code(SECONDS_TO_STOP + 5)  # data workers and the launcher's own pauses included
        print(f"{target}: gone after {time.monotonic() - started:.1f} s with code {code}")
        state = job.state()
    assert state["status"] == "stopped" and state["step"] >= 5, job.log
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1]
    assert newest == state["step"] and verify(tmp_path / "run" / "checkpoints" / f"step-{newest:08d}")


def test_a_signal_to_a_paused_run_stops_it(tmp_path, rows):
    with Launched(0, tmp_path / "run", data_path=rows, epochs=400, save_interval="5000") as job:
        job.wait_for_step(5)
        (tmp_path / "run" / "control.json").write_text('{"id": 1, "command": "pause"}')
        job.wait_for(lambda: job.state()["status"] == "paused")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.exit_code(SECONDS_TO_STOP) == 75
    assert job.state()["status"] == "stopped"


class TwoSignals:
    """SIGTERM in the middle of a step that takes a minute, and once more after `gap` seconds."""

    def __init__(self, gap):
        self.gap = gap

    def __call__(self, objective, rank):
        def endless(model, batch):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(self.gap)
            time.sleep(60)
            return objective(model, batch)

        return endless


def test_a_second_signal_ends_at_once(tmp_path, rows):
    started = time.monotonic()
    codes = train(1, tmp_path / "run", data_path=str(rows), wrap_objective=TwoSignals(gap=1.0))
    assert codes == [-signal.SIGTERM] and time.monotonic() - started < 20


@pytest.mark.parametrize("seconds", [1.5, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.3, 3.0, 5.0))])
def test_before_the_first_step_a_signal_ends_the_program_and_leaves_nothing_behind(tmp_path, rows, seconds):
    """While it imports, reads data, or builds the model."""
    big = write_rows(tmp_path / "big.jsonl", count=6000)
    with Launched(0, tmp_path / "run", data_path=big, max_steps=3) as job:
        time.sleep(seconds)
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.exit_code(SECONDS_TO_STOP) in (-signal.SIGTERM, 75)
    assert not (tmp_path / "run" / "final").exists()
    with Launched(0, tmp_path / "run", data_path=big, max_steps=3, from_resume=1) as job:
        assert job.exit_code(60) == 0, job.log
