"""A run as other programs see it: its status, its history, and the commands that it takes."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from training.observe import WrongStateError, read_history, read_state, seen_status, send_command


def make_run(folder, **state):
    values = {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), "updated_at": time.time()}
    (folder / "state.json").write_text(json.dumps({**values, **state}))
    return folder


@pytest.mark.parametrize("status", ["pending", "running", "pausing", "paused", "stopping"])
def test_a_run_whose_process_is_gone_has_crashed(tmp_path, status):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert read_state(make_run(tmp_path, status=status, pid=gone.pid))["status"] == "crashed"
    assert read_state(make_run(tmp_path, status=status))["status"] == status


@pytest.mark.parametrize("status", ["completed", "stopped", "failed"])
def test_an_ended_run_stays_what_it_is_without_its_process(tmp_path, status):
    assert read_state(make_run(tmp_path, status=status, pid=0, updated_at=0.0))["status"] == status


def test_a_later_process_with_the_same_number_is_not_the_run(tmp_path):
    assert read_state(make_run(tmp_path, updated_at=time.time() - 10 * 365 * 86400.0))["status"] == "crashed"


def test_a_run_on_another_host_can_only_be_seen_to_be_silent():
    state = {"status": "running", "pid": 1, "host": "elsewhere", "updated_at": 1000.0}
    assert seen_status(state, now=1100.0) == "running"
    assert seen_status(state, now=1121.0) == "stalled"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": 3}', "[" * 100_000])
def test_a_file_that_is_no_state_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a run"):
        read_state(tmp_path)


def test_a_command_reaches_the_control_file_with_a_new_id(tmp_path):
    run = make_run(tmp_path)
    first, second = send_command(run, "save"), send_command(run, "pause")
    assert first != second
    assert json.loads((run / "control.json").read_text()) == {"id": second, "command": "pause"}
    assert not list(run.glob(".control*"))


@pytest.mark.parametrize(
    ("status", "command"),
    [("paused", "pause"), ("running", "resume"), ("completed", "stop"), ("pending", "save"), ("failed", "pause")],
)
def test_a_command_in_the_wrong_state_is_refused_and_writes_nothing(tmp_path, status, command):
    run = make_run(tmp_path, status=status)
    with pytest.raises(WrongStateError, match=f"is {status}, and {command} needs"):
        send_command(run, command)
    assert not (run / "control.json").exists()


def test_an_unknown_command_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'halt' is none of pause, resume, save, stop"):
        send_command(make_run(tmp_path), "halt")


def test_history_comes_in_columns_with_gaps(tmp_path):
    lines = [
        {"step": 1, "time": 1.0, "kind": "train", "train/loss": 2.0},
        {"step": 1, "time": 1.5, "kind": "eval", "eval/loss": 2.5},
        {"step": 2, "time": 2.0, "kind": "train", "train/loss": None, "non_finite": ["train/loss"]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ki')
    assert read_history(tmp_path) == {
        "step": [1, 2], "time": [1.0, 2.0], "train/loss": [2.0, None], "non_finite": [None, ["train/loss"]],
    }  # fmt: skip
    assert read_history(str(tmp_path), "eval")["eval/loss"] == [2.5]
    assert read_history(tmp_path, "system") == {}
