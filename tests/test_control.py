"""What the outside asks of a run between two steps: commands in a file, and stops that lose nothing."""

import json
import os
import signal

import pytest

from tests.small_world import log_of, train, without_events, write_rows
from training.control.requests import PAUSE, SAVE, STOP, ControlFile, SignalFlags, Stopped, Wishes


def command(path, number, word):
    """Written as other programs should: whole, under its name at once."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"id": number, "command": word}))
    os.replace(draft, path)


def test_each_command_is_obeyed_once(tmp_path):
    path = tmp_path / "control.json"
    command(path, 1, STOP)
    control = ControlFile(path)
    assert control.read() is None, "that was for an earlier run"
    command(path, 2, SAVE)
    assert [control.read(), control.read()] == [SAVE, None]
    command(path, 2, SAVE)
    assert control.read() is None, "the file is another one, the command is not"
    command(path, 3, SAVE)
    assert control.read() == SAVE


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"id": 1, "command": "format"}', '{"command": "stop"}', "x" * 5000]
)
def test_what_is_no_command_is_ignored_and_said_once(tmp_path, caplog, content):
    control = ControlFile(tmp_path / "control.json")
    (tmp_path / "control.json").write_text(content)
    assert [control.read(), control.read()] == [None, None]
    assert caplog.text.count("is ignored") == 1


def test_a_pause_begins_with_one_checkpoint_and_ends_with_a_command(tmp_path):
    path, done = tmp_path / "control.json", []
    wishes = Wishes(SignalFlags(), ControlFile(path))
    command(path, 1, PAUSE)

    def beat():
        done.append("beat")
        if done.count("beat") == 2:
            command(path, 2, "resume")

    def obey():
        wishes.obey(wishes.look(), list, lambda: done.append("save"), lambda *said: done.append(said), beat)

    obey()
    assert done == [("pausing",), "save", ("paused", 1), "beat", "beat", ("running", 2)]
    obey()
    assert len(done) == 6
    command(path, 3, SAVE)
    obey()
    assert done[6:] == ["save", ("saved", 3)]
    command(path, 4, STOP)
    with pytest.raises(Stopped, match="a stop command"):
        obey()


class StopInValidation:
    """SIGTERM to one rank in the n-th pass over held-out rows."""

    def __init__(self, call, victim):
        self.call, self.victim = call, victim

    def __call__(self, objective, rank):
        calls = 0

        def stopping(model, batch):
            nonlocal calls
            calls += not model.training
            if rank == self.victim and calls == self.call and not model.training:
                os.kill(os.getpid(), signal.SIGTERM)
            return objective(model, batch)

        return stopping


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_during_validation_loses_none_of_it(tmp_path, world_size):
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    flags = {"data_path": rows, "val_data_path": rows, "save_interval": "500", "max_steps": 9, "eval_interval": "4"}
    assert train(world_size, tmp_path / "whole", **flags) == [0] * world_size, log_of(tmp_path / "whole")
    stop = StopInValidation(call=2, victim=world_size - 1)
    assert set(train(world_size, tmp_path / "cut", wrap_objective=stop, **flags)) == {75}
    assert "stopped after step 4" in log_of(tmp_path / "cut")
    assert train(world_size, tmp_path / "cut", from_resume="1", **flags) == [0] * world_size, log_of(tmp_path / "cut")
    assert without_events(tmp_path / "cut") == without_events(tmp_path / "whole")
