"""kill -9 at random instants, a third of them forced inside a save, again and again: the end has the same bits.

A seed names every instant, so that a failure can be had again.
"""

import json
import os
import random
import signal
import threading
import time

import pytest

from tests.faults.launched import Launched
from tests.small_world import log_of, train, without_events
from training.checkpoints.store import CheckpointStore

FLAGS = {"epochs": 12, "save_interval": "3", "keep_last": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, rows):
    results = {}

    def result(world_size, strategy, dtype):
        key = (world_size, strategy, dtype)
        if key not in results:
            run = tmp_path_factory.mktemp("whole") / "run"
            flags = {**FLAGS, "data_path": str(rows), "strategy": strategy, "dtype": dtype}
            started = time.monotonic()
            assert train(world_size, run, **flags) == [0] * world_size, log_of(run)
            results[key] = (without_events(run), time.monotonic() - started)
        return results[key]

    return result


class RandomKill:
    """kill -9 of one rank: some time after its first step, or within a chosen call of a save."""

    def __init__(self, seed, world_size, seconds):
        rng = random.Random(seed)
        self.victim, self.in_save = rng.randrange(world_size), rng.random() < 1 / 3
        self.delay, self.call = rng.uniform(0, seconds), rng.randrange(1, 40)

    def __call__(self, objective, rank):
        if rank != self.victim:
            return objective
        if self.in_save:
            self.kill_in_a_save()
            return objective
        timer = threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True

        def watched(model, batch):
            if timer.ident is None:
                timer.start()
            return objective(model, batch)

        return watched

    def kill_in_a_save(self):
        """Every function by which a save touches the disk counts, in whatever thread."""
        from training.checkpoints import manifest, store, tensor_files

        calls = 0

        def deadly(function):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == self.call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        named = [(store, "write_shard"), (store, "write_json"), (store, "fsync_path"), (manifest, "fsync_path")]
        for module, name in [*named, (tensor_files, "_bytes")]:
            setattr(module, name, deadly(getattr(module, name)))


def chain(seed):
    """World size, strategy, dtype and background saving of a chain of kills."""
    rng = random.Random(f"chain {seed}")
    world_size = 1 + seed % 2
    strategy = "fsdp" if seed % 4 == 3 else "ddp"
    return world_size, strategy, rng.choice(("float32", "bfloat16", "float16")), rng.random() < 0.5


FAST = (1, 3)  # two processes, ddp and fsdp


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in FAST else pytest.mark.slow) for seed in range(50)]
)
def test_a_run_killed_four_times_ends_with_the_same_bits(tmp_path, rows, uninterrupted, seed):
    world_size, strategy, dtype, in_background = chain(seed)
    expected, seconds = uninterrupted(world_size, strategy, dtype)
    flags = {**FLAGS, "data_path": str(rows), "strategy": strategy, "dtype": dtype, "async_save": in_background}
    print(f"seed {seed}: {world_size} processes, {strategy}, {dtype}, async_save {in_background}")
    run, kills, attempt = tmp_path / "run", 0, 0
    while kills < 4:
        attempt += 1
        killer = RandomKill(f"{seed} {attempt}", world_size, seconds / 2)
        codes = train(world_size, run, from_resume="1", wrap_objective=killer, **flags)
        if codes == [0] * world_size:  # it was over before the kill: the next one has a run of its own
            assert without_events(run) == expected, f"seed {seed}, attempt {attempt}"
            run = tmp_path / f"run-{attempt}"
            continue
        assert codes[killer.victim] == -signal.SIGKILL, log_of(run, killer.victim)
        kills += 1
        losses = lost_steps(run)
        assert losses <= 3 * (1 + in_background), f"seed {seed}, attempt {attempt}: {losses} steps lost"
    assert train(world_size, run, from_resume="1", **flags) == [0] * world_size, log_of(run)
    assert without_events(run) == expected, f"seed {seed}"


def lost_steps(run):
    """Steps that were logged and will be done again."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    logged = max((record["step"] for record in map(json.loads, lines)), default=0)
    return logged - max(CheckpointStore(run / "checkpoints").steps(), default=0)


@pytest.mark.parametrize(
    ("strategy", "kills"),
    [("ddp", 2), *(pytest.param(strategy, 4, marks=pytest.mark.slow) for strategy in ("ddp", "fsdp"))],
)
def test_torchrun_restarts_a_job_whose_ranks_are_killed(tmp_path, rows, strategy, kills):
    """--max-restarts: the restarted ranks go on from the last checkpoint although nobody says --from_resume."""
    flags = {"epochs": 15 * kills, "save_interval": "5", "keep_last": 2, "strategy": strategy}
    assert train(2, tmp_path / "whole", data_path=str(rows), **flags) == [0, 0]
    rng = random.Random(1)
    with Launched(2, tmp_path / "run", torchrun=(f"--max-restarts={kills}",), data_path=rows, **flags) as job:
        last_pid = None
        for number in range(kills):
            job.wait_for(lambda last=last_pid: job.state().get("pid", last) != last)  # rank 0 of the restarted job
            last_pid = job.state()["pid"]
            reached = max((record["step"] for record in job.records("train")), default=0) + rng.randrange(2, 12)
            job.wait_for_step(reached)
            os.kill(job.ranks()[rng.randrange(2)], signal.SIGKILL)
            print(f"kill {number + 1} at step {reached}")
        assert job.exit_code(60) == 0, job.log
    assert without_events(tmp_path / "run") == without_events(tmp_path / "whole")
