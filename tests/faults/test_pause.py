"""A paused run waits as long as it takes, loses nothing while it waits, and ends with the bits of one never paused."""

import json
import os
import random
import signal
import threading
import time

import pytest

from tests.faults.launched import Launched
from tests.small_world import log_of, records_of, train, without_events
from training.control.requests import ControlFile


def command(run, name, number):
    """As another program gives it: written beside, then renamed."""
    draft = run / f".control.{number}"
    draft.write_text(json.dumps({"id": number, "command": name}))
    os.replace(draft, run / "control.json")


class CommandAt:
    """Rank 0 finds these commands in its control file: {training pass: command}; `later` follow one per look."""

    def __init__(self, run, commands):
        self.run, self.commands = run, commands

    def __call__(self, objective, rank):
        calls = 0

        def watched(model, batch):
            nonlocal calls
            calls += model.training
            if rank == 0 and model.training and calls in self.commands:
                first, then, seconds = self.commands[calls]
                command(self.run, first, f"{calls} first")
                if then:
                    threading.Timer(seconds, command, (self.run, then, f"{calls} then")).start()
            return objective(model, batch)

        return watched


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_pause_of_three_times_the_time_limit_changes_no_bit(tmp_path, rows, world_size, strategy):
    limit = 2
    flags = {"data_path": str(rows), "val_data_path": str(rows), "group_timeout_seconds": limit, "strategy": strategy}
    assert train(world_size, tmp_path / "whole", **flags) == [0] * world_size, log_of(tmp_path / "whole")
    pause = CommandAt(tmp_path / "paused", {4: ("pause", "resume", 3 * limit)})
    started = time.monotonic()
    codes = train(world_size, tmp_path / "paused", wrap_objective=pause, **flags)
    assert codes == [0] * world_size, log_of(tmp_path / "paused")
    assert time.monotonic() - started > 3 * limit
    assert without_events(tmp_path / "paused") == without_events(tmp_path / "whole")
    times = records_of(tmp_path / "paused", "train")
    assert max(r["train/seconds_per_step"] for r in times) < limit, "a pause is no slow step"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, "stop"])
def test_what_ends_a_paused_run_loses_nothing(tmp_path, rows, how):
    flags = {"data_path": rows, "epochs": 40, "save_interval": "5000", "log_interval": "1"}
    assert train(2, tmp_path / "whole", **{**flags, "data_path": str(rows)}) == [0, 0]
    with Launched(2, tmp_path / "run", **flags) as job:
        job.wait_for_step(3)
        command(tmp_path / "run", "pause", 1)
        job.wait_for(lambda: job.state()["status"] == "paused")
        step = job.state()["step"]
        if how == "stop":
            command(tmp_path / "run", "stop", 2)
        else:
            os.kill(job.ranks()[1] if how == signal.SIGKILL else job.process.pid, how)
        job.exit_code(15)
        assert job.records("train")[-1]["step"] == step
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert train(2, tmp_path / "run", from_resume="1", **{**flags, "data_path": str(rows)}) == [0, 0]
    assert without_events(tmp_path / "run") == without_events(tmp_path / "whole")


@pytest.mark.slow
def test_a_hundred_toggles_change_no_bit(tmp_path, rows):
    flags = {"data_path": str(rows), "epochs": 40, "save_interval": "5000"}
    assert train(2, tmp_path / "whole", **flags) == [0, 0]
    rng = random.Random(0)
    toggles = {4 * n: ("pause", "resume", rng.uniform(0.0, 0.03)) for n in range(1, 101)}
    codes = train(2, tmp_path / "toggled", wrap_objective=CommandAt(tmp_path / "toggled", toggles), **flags)
    assert codes == [0, 0], log_of(tmp_path / "toggled")
    assert without_events(tmp_path / "toggled") == without_events(tmp_path / "whole")


def test_commands_save_and_stop(tmp_path, rows):
    flags = {"data_path": str(rows), "save_interval": "5000"}
    orders = CommandAt(tmp_path / "run", {4: ("save", None, 0), 7: ("stop", None, 0)})
    assert train(1, tmp_path / "run", wrap_objective=orders, **flags) == [0]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000004", "step-00000007"]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["exit_reason"], state["step"]) == ("stopped", "a stop command", 7)
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0], "the old command is not obeyed again"
    assert (tmp_path / "run" / "final").is_dir()


HOSTILE = {
    "nothing": b"",
    "no JSON": b"\xff\xfe{",
    "a list": b"[1]",
    "no id": b'{"command": "stop"}',
    "an unknown command": b'{"id": 1, "command": "rm -rf /"}',
    "a command that is no text": b'{"id": 1, "command": {"stop": 1}}',
    "deep nesting": b"[" * 100_000,
    "too long": b'{"id": 1, "command": "stop", "x": "' + b"x" * 10_000 + b'"}',
    "an id that is a list": b'{"id": [1], "command": "halt"}',
}


@pytest.mark.parametrize("content", HOSTILE)
def test_a_hostile_control_file_is_ignored(tmp_path, content):
    control = ControlFile(tmp_path / "control.json")
    (tmp_path / "control.json").write_bytes(HOSTILE[content])
    assert control.read() is None
    command(tmp_path, "save", 7)
    assert control.read() == "save" and control.read() is None
    command(tmp_path, "save", 7)
    assert control.read() is None, "the same id is obeyed once"


@pytest.mark.parametrize("kind", ["pipe", "link", "directory", "device"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, kind):
    control, path = ControlFile(tmp_path / "control.json"), tmp_path / "control.json"
    (tmp_path / "elsewhere").write_text('{"id": 1, "command": "stop"}')
    {
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "directory": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    assert control.read() is None


def test_max_hours_saves_and_stops_in_time(tmp_path, rows):
    flags = {"data_path": str(rows), "epochs": 4000, "save_interval": "50000", "log_interval": "50"}
    started = time.monotonic()
    assert train(2, tmp_path / "run", max_hours=5 / 3600, **flags) == [0, 0]
    assert time.monotonic() - started < 20
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["exit_reason"] == "--max_hours"
    assert (tmp_path / "run" / "checkpoints" / f"step-{state['step']:08d}").is_dir()
