"""A run as other programs see it: its status, its history, and the commands that it takes."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from training.control.lock import lock_run
from training.records.run_files import (
    WrongStateError,
    checked,
    is_held,
    read_history,
    read_state,
    run_state,
    seen_status,
    send_command,
)


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
    state = checked({"status": "running", "pid": 1, "host": "elsewhere", "updated_at": 1000.0})
    assert seen_status(state, now=1100.0) == "running"
    assert seen_status(state, now=1121.0) == "stalled"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": 3}', "[" * 100_000])
def test_a_file_that_is_no_state_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a run"):
        read_state(tmp_path)


def obey(run, **state):
    """As the trainer does: say which request it was."""
    said = json.loads((run / "state.json").read_text())
    asked = json.loads((run / "control.json").read_text())
    obeyed = {"obeyed": {"id": asked["id"], "step": 5}}
    (run / "state.json").write_text(json.dumps({**said, **obeyed, "updated_at": time.time(), **state}))


def live_run(folder, **state):
    return make_run(folder, started_at=time.time() - 9, **state)


def test_a_command_reaches_the_control_file_with_a_new_id(tmp_path):
    run = live_run(tmp_path)
    first = send_command(run, "save")
    assert json.loads((run / "control.json").read_text()) == {"id": first, "command": "save"}
    obey(run)
    second = send_command(run, "save")
    assert first != second
    assert json.loads((run / "control.json").read_text()) == {"id": second, "command": "save"}
    assert not list(run.glob(".control*"))


@pytest.mark.parametrize(
    ("status", "first", "then"),
    [
        ("running", "save", "pause"), ("running", "save", "stop"), ("running", "pause", "stop"),
        ("running", "pause", "resume"), ("paused", "resume", "stop"), ("paused", "save", "stop"),
    ],
)  # fmt: skip
def test_a_command_takes_the_place_of_one_that_it_implies_or_undoes(tmp_path, status, first, then):
    run = live_run(tmp_path, status=status)
    one = send_command(run, first)
    assert then in run_state(run).accepts
    two = send_command(run, then)
    assert two != one and json.loads((run / "control.json").read_text()) == {"id": two, "command": then}


@pytest.mark.parametrize(
    ("status", "first", "then"),
    [("running", "stop", "pause"), ("running", "stop", "save"), ("running", "pause", "save"),
     ("paused", "stop", "resume"), ("paused", "save", "resume"), ("paused", "resume", "save")],
)  # fmt: skip
def test_a_command_that_is_not_obeyed_yet_is_not_lost(tmp_path, status, first, then):
    run = live_run(tmp_path, status=status)
    one = send_command(run, first)
    assert send_command(run, first) == one, "the same again is the same request"
    assert then not in run_state(run).accepts
    with pytest.raises(WrongStateError, match=f"has not obeyed {first} yet"):
        send_command(run, then)
    assert json.loads((run / "control.json").read_text()) == {"id": one, "command": first}
    obey(run)
    if first != "stop":
        assert then in run_state(run).accepts
        assert send_command(run, then) != one


def test_what_an_earlier_start_was_asked_is_not_waited_for(tmp_path):
    run = make_run(tmp_path, started_at=time.time() + 60)
    send_command(run, "stop")
    assert send_command(run, "save")


def test_a_resume_of_what_runs_stands_in_nobodys_way_for_long(tmp_path):
    run = live_run(tmp_path)
    send_command(run, "pause")
    send_command(run, "resume")
    with pytest.raises(WrongStateError, match="has not obeyed resume yet"):
        send_command(run, "save")
    live_run(tmp_path, updated_at=time.time() + 3)  # it has gone on, and there was nothing to resume
    assert send_command(run, "save")


@pytest.mark.parametrize("text", ["", "[]", '{"id": 1}', '{"id": 1, "command": "halt"}', "[" * 100_000, "x" * 9000])
def test_a_control_file_that_no_trainer_obeys_is_no_request(tmp_path, text):
    run = live_run(tmp_path)
    (run / "control.json").write_text(text)
    assert send_command(run, "save")
    (run / "control.json").unlink()
    (run / "control.json").symlink_to("/dev/zero")
    assert send_command(run, "save")


def test_a_damaged_state_is_a_state_without_those_values(tmp_path):
    odd = {
        "step": "12",
        "total_steps": "x",
        "epoch": 1.5,
        "stage": -1,
        "seconds": "1",
        "started_at": float("nan"),
        "updated_at": 1e999,
        "pid": True,
        "host": 3,
        "exit_reason": ["x"],
        "exit_code": 10**30,
        "obeyed": "no",
    }
    state = run_state(make_run(tmp_path, **odd))
    assert state.status == "running" and state.share is None
    assert {getattr(state, name) for name in odd} == {None}
    assert read_state(tmp_path) == {"status": "running", "accepts": ("pause", "save", "stop")}
    good = {"step": 3, "total_steps": 12, "epoch": 0, "stage": 0, "seconds": 4, "started_at": 1, "exit_code": 3}
    state = run_state(make_run(tmp_path, status="failed", **good))
    assert {name: getattr(state, name) for name in good} == good and state.share == 0.25 and state.accepts == ()


def test_whether_a_directory_is_held_is_seen_without_taking_it(tmp_path):
    assert not is_held(tmp_path)
    program = (
        "import sys, pathlib as p, training.control.lock as l; f = l.lock_run(p.Path(sys.argv[1])); print(1); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "1\n"
        assert is_held(tmp_path)
        with pytest.raises(ValueError, match="is being trained by"):
            lock_run(tmp_path)
        holder.communicate("\n")
    assert (tmp_path / ".lock").exists() and not is_held(tmp_path)


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
