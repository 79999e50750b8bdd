"""A run is steered and asked from another process: python -m scripts.control."""

import json
import os
import socket
import sys
import time

import pytest

from scripts import control
from tests.faults.launched import Launched
from tests.small_world import records_of, train, without_events, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl"))


def make_run(folder, **state):
    values = {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), "updated_at": time.time()}
    (folder / "state.json").write_text(json.dumps({**values, **state}))
    return str(folder)


def test_a_live_run_pauses_saves_goes_on_and_stops(tmp_path, rows, capsys):
    flags = {"data_path": rows, "epochs": 400, "save_interval": "50000", "log_interval": "1"}
    run = tmp_path / "run"

    def ask(*words):
        code = control.main([str(run), *words, "--timeout", "30"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    with Launched(2, run, **flags) as job:
        job.wait_for_step(3)
        assert "save is asked for" in ask("save")
        ask("pause", "--wait")
        state = job.state()
        assert state["status"] == "paused"
        time.sleep(2.2)
        assert state["updated_at"] + 1 < job.state()["updated_at"], "a paused run lets itself be heard of"
        assert json.loads(ask("status", "--json"))["last"]["step"] == state["step"]
        assert f"paused, step {state['step']} of" in ask("status")
        answer = json.loads(ask("resume", "--wait", "--json"))
        assert (answer["command"], answer["status"]) == ("resume", "running")
        ask("save", "--wait")
        newest = sorted(os.listdir(run / "checkpoints"))[-1]
        assert int(newest.removeprefix("step-")) > state["step"]
        ask("stop", "--wait")
        assert job.exit_code(30) == 0
    assert "stopped (a stop command)" in ask("status")
    events = [r for r in records_of(run, "event") if r["event"] in ("pause", "resume", "save", "stop")]
    names = [event["event"] for event in events]
    assert names in (["save", "pause", "resume", "save", "stop"], ["pause", "resume", "save", "stop"]), names
    pause, resume = events[names.index("pause")], events[names.index("resume")]
    assert pause["step"] == resume["step"] == state["step"] and resume["seconds"] > 2
    # Steps of some milliseconds: a pause of seconds would show in each of these.
    after = next(r for r in records_of(run, "train") if r["step"] == state["step"] + 1)
    assert after["train/seconds_per_step"] < 1.5
    assert control.main([str(run), "pause"]) == 2
    assert "is stopped, and pause needs a run that is running" in capsys.readouterr().err


class Statuses:
    """What state.json says while checkpoints are made: in a pause, and when a stop command has come."""

    def __init__(self, run, seen):
        self.run, self.seen = run, seen

    def __call__(self, objective, rank):
        from training.checkpoints.checkpointer import Checkpointer
        from training.records.run_files import send_command

        original, calls = Checkpointer.save, 0

        def saving(*args, **options):
            with open(self.seen, "a") as file:
                file.write(json.loads((self.run / "state.json").read_text())["status"] + "\n")
            return original(*args, **options)

        Checkpointer.save = saving

        def commanding(model, batch):
            nonlocal calls
            calls += 1
            if calls == 3:
                send_command(self.run, "pause")
                import threading

                threading.Timer(1.5, send_command, (self.run, "resume")).start()
            elif calls == 6:
                send_command(self.run, "stop")
            return objective(model, batch)

        return commanding


def test_pausing_and_stopping_stand_in_the_state_while_it_is_saved(tmp_path, rows):
    statuses = Statuses(tmp_path / "run", tmp_path / "seen")
    flags = {"data_path": rows, "save_interval": "50000"}
    assert train(1, tmp_path / "run", wrap_objective=statuses, **flags) == [0]
    assert (tmp_path / "seen").read_text().split() == ["pausing", "stopping"]
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "stopped"
    # Gone on from its checkpoint, no event stands twice, and nothing is as if it had never paused.
    before = [(r["event"], r["step"]) for r in records_of(tmp_path / "run", "event")]
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0]
    after = [(r["event"], r["step"]) for r in records_of(tmp_path / "run", "event")]
    assert after[: len(before)] == before and ("pause", 3) in before and ("stop", 6) in before
    assert train(1, tmp_path / "whole", **flags) == [0]
    assert without_events(tmp_path / "run") == without_events(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "state", "code", "said"),
    [
        (["pause"], {"status": "paused"}, 2, "is paused, and pause needs a run that is running"),
        (["resume"], {"status": "running"}, 2, "resume needs a run that is paused or pausing"),
        (["stop"], {"status": "stopping"}, 2, "is stopping, and stop needs"),
        (["save"], {"status": "completed"}, 2, "is completed, and save needs"),
        (["pause", "--wait", "--timeout", "0.2"], {"status": "running"}, 1, "has not obeyed within 0.2 s"),
        (["status"], {"status": 7}, 74, "not the state of a run"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, capsys, words, state, code, said):
    assert control.main([make_run(tmp_path, **state), *words]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "pause"])
def test_where_there_is_no_run_that_is_said_with_its_neighbours(tmp_path, capsys, command):
    assert control.main([str(tmp_path / "none"), command]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none is no run: it has no state.json\n"
    (tmp_path / "mine").mkdir()
    make_run(tmp_path / "mine")
    assert control.main([str(tmp_path), command]) == 2
    assert "there are runs in it: mine" in capsys.readouterr().err
    assert control.main([str(tmp_path / "none"), command]) == 2
    assert f"there are runs in {tmp_path}: mine" in capsys.readouterr().err


def test_a_damaged_state_is_read_without_a_traceback(tmp_path, capsys):
    odd = {"step": "12", "total_steps": "x", "epoch": None, "updated_at": "now", "pid": "me", "obeyed": {"id": 1}}
    run = make_run(tmp_path, host="elsewhere", exit_reason={"a": 1}, **odd)
    assert control.main([run, "status"]) == 0
    assert capsys.readouterr().out == f"{run}: running, process None on elsewhere\n"
    assert control.main([run, "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] is None
    assert control.main([run, "save", "--wait", "--timeout", "0.1"]) == 1


def test_waiting_ends_when_another_command_has_come_since(tmp_path, capsys):
    import threading

    run = make_run(tmp_path, started_at=time.time() - 9)
    stop = threading.Timer(0.3, control.send_command, (tmp_path, "stop"))
    stop.start()
    assert control.main([run, "pause", "--wait", "--timeout", "20"]) == 2
    stop.join()
    assert "asked to stop since, and may not have obeyed pause" in capsys.readouterr().err
    assert control.main([run, "save"]) == 2
    assert "has not obeyed stop yet" in capsys.readouterr().err


def test_waiting_for_a_save_ends_with_the_pause_that_has_taken_its_place(tmp_path, capsys):
    import threading

    run = make_run(tmp_path, started_at=time.time() - 9)

    def pause():
        control.send_command(tmp_path, "pause")
        time.sleep(0.3)
        make_run(tmp_path, started_at=time.time() - 9, status="paused")

    timer = threading.Timer(0.3, pause)
    timer.start()
    assert control.main([run, "save", "--wait", "--timeout", "20"]) == 0
    timer.join()


def test_a_command_that_is_none_is_a_wrong_use(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        control.main([str(tmp_path), "halt"])
    assert stopped.value.code == 2


def test_a_status_reads_as_a_sentence(tmp_path, capsys):
    record = {"step": 40, "time": 1.0, "kind": "train", "train/loss": 2.0, "eta_seconds": 200.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run = make_run(tmp_path, step=40, total_steps=200, epoch=1)
    assert control.main([run, "status"]) == 0
    place = f"process {os.getpid()} on {socket.gethostname()}, heard of 0s ago"
    assert capsys.readouterr().out == (
        f"{run}: running, step 40 of 200 (20%), epoch 2, loss 2.0000, 3m20s to go, {place}\n"
    )


def test_it_needs_no_torch():
    import subprocess

    program = "import sys, scripts.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
