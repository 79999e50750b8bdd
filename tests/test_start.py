"""How flags, the run's directory and restarts by torchrun decide together how a run begins."""

import dataclasses
import json
import os

import pytest

from scripts.checkpoints import main as checkpoints
from tests.small_world import KillAtCall, log_of, records_of, sha256, train, write_rows
from training.run.directory import JOB, Start, begin, decide_start, has_begun, refuse_changes

AFRESH, NEWEST = Start(), Start(resumes=True, continues=True)


@pytest.fixture
def places(tmp_path):
    """An empty directory, two runs, and a result without checkpoints."""
    made = {name: tmp_path / name for name in ("empty", "run", "other", "result")}
    for path in made.values():
        path.mkdir()
    for name in ("run", "other"):
        checkpoint = made[name] / "checkpoints" / "step-00000004"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
    (made["result"] / "final").mkdir()
    return made


@pytest.mark.parametrize(
    ("place", "from_resume", "overwrite", "begun", "expected"),
    [
        ("empty", "0", False, False, AFRESH),
        ("empty", "1", False, False, NEWEST),
        ("empty", "0", True, False, Start(clears=True)),
        ("empty", "0", False, True, NEWEST),  # killed before its first checkpoint
        ("run", "1", False, False, NEWEST),
        ("run", "0", True, False, Start(clears=True)),
        ("run", "0", True, True, NEWEST),  # its own by now
        ("run", "0", False, True, NEWEST),
        ("result", "0", True, False, Start(clears=True)),
    ],
)
def test_the_start_follows_from_flags_directory_and_job(places, place, from_resume, overwrite, begun, expected):
    assert decide_start(places[place], from_resume, overwrite, begun) == expected


def test_a_checkpoint_elsewhere_branches_off_until_the_branch_has_begun(places):
    named = places["run"] / "checkpoints" / "step-00000004"
    branch = Start(resumes=True, checkpoint=named)
    assert decide_start(places["empty"], str(named), False, False) == branch
    assert decide_start(places["empty"], str(named), False, True) == NEWEST
    assert decide_start(places["run"], str(named), False, False) == dataclasses.replace(branch, continues=True)
    other = places["other"] / "checkpoints" / "step-00000004"
    with pytest.raises(ValueError, match="already holds a run"):
        decide_start(places["run"], str(other), False, False)


def test_a_job_has_begun_when_its_name_stands_there_and_it_was_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    begin(tmp_path, clears=False)
    assert not has_begun(tmp_path), "started for the first time"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert has_begun(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert not has_begun(tmp_path), "another job"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun says so without a rendezvous
    assert not has_begun(tmp_path)
    begin(tmp_path, clears=False)
    assert has_begun(tmp_path), "the same launcher"
    (tmp_path / JOB).write_text("[" * 100_000)
    assert not has_begun(tmp_path)


@pytest.mark.parametrize(
    ("place", "from_resume", "message"),
    [
        ("run", "0", "already holds a run: continue it with --from_resume 1"),
        ("result", "0", "already holds a run"),
        ("result", "1", "holds a result but no checkpoint"),
        ("empty", "nowhere", "--from_resume nowhere is no checkpoint"),
    ],
)
def test_what_would_lose_a_run_or_cannot_be_is_refused(places, place, from_resume, message):
    with pytest.raises(ValueError, match=message):
        decide_start(places[place], from_resume, False, False)


def test_changes_are_shown_with_both_values():
    assert refuse_changes({"seed": 1, "data": "a"}, {"seed": 1, "data": "a"}, []) == []
    assert refuse_changes({"seed": 1, "data": "a"}, {"seed": 2, "data": "a"}, ["seed"]) == ["seed"]
    with pytest.raises(ValueError, match="data: the checkpoint has a, this run b"):
        refuse_changes({"seed": 1, "data": "a"}, {"seed": 2, "data": "b"}, ["seed"])


# ---------------------------------------------------------------------------------------------------------------------
# The same in runs


def restarted_by_torchrun(objective, rank):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return objective


def test_a_restart_by_torchrun_does_not_overwrite_the_run_that_it_continues(tmp_path, rows):
    flags = {"data_path": str(rows), "overwrite": True, "max_steps": 4, "save_interval": "2"}
    assert train(1, tmp_path / "run", wrap_objective=KillAtCall(4), **flags) == [-9]
    assert train(1, tmp_path / "run", wrap_objective=restarted_by_torchrun, **flags) == [0]
    assert [r["step"] for r in records_of(tmp_path / "run", "train")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


def dies_while_it_starts(objective, rank):
    import train_full_sft

    train_full_sft.make_optimizer = lambda *_: os._exit(9)
    return objective


def test_a_restart_does_not_take_the_run_to_be_overwritten_for_its_own(tmp_path, rows):
    flags = {"data_path": str(rows), "save_interval": "2"}
    assert train(1, tmp_path / "run", **flags, max_steps=4) == [0]
    (tmp_path / "run" / JOB).write_text('{"name": "another job"}')
    flags |= {"overwrite": True, "max_steps": 6}
    assert train(1, tmp_path / "run", wrap_objective=dies_while_it_starts, **flags) == [9]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2, "nothing was deleted before it was sure"
    assert train(1, tmp_path / "run", wrap_objective=restarted_by_torchrun, **flags) == [0], log_of(tmp_path / "run")
    assert "resumed" not in log_of(tmp_path / "run")
    assert [r["step"] for r in records_of(tmp_path / "run", "train")] == list(range(1, 7))


def test_a_restart_of_a_job_that_was_refused_is_refused_too(tmp_path, rows):
    """torchrun starts it again whatever it ended for."""
    flags = {"data_path": str(rows), "save_interval": "2"}
    assert train(1, tmp_path / "run", **flags, max_steps=4) == [0]
    (tmp_path / "run" / JOB).write_text('{"name": "another job"}')
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert train(1, tmp_path / "run", wrap_objective=restarted_by_torchrun, **flags, max_steps=6) == [2]
    assert "already holds a run" in log_of(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_version_that_was_set_aside_goes_on_in_the_place_of_the_one_that_replaced_it(tmp_path, rows):
    flags = {"data_path": str(rows), "save_interval": "2", "max_steps": 8}
    run = tmp_path / "run"
    assert train(1, run, **flags) == [0]
    first = sha256(run / "final" / "model.safetensors")
    older = {"from_resume": str(run / "checkpoints" / "step-00000004")}
    assert train(1, run, **flags, **older, grad_clip=0.01, allow_change="optimizer") == [0]
    second = sha256(run / "final" / "model.safetensors")
    assert second != first
    aside = {"from_resume": str(run / "checkpoints" / "aside-step-00000008")}
    assert train(1, run, **flags, **aside) == [0], log_of(run)
    assert sha256(run / "final" / "model.safetensors") == first
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert {"aside-step-00000008", "aside-2-step-00000008", "step-00000008"} <= set(names), "no version is lost"
    assert checkpoints(["verify", str(run)]) == 0


def fails_in_a_library(objective, rank):
    import torch

    return lambda model, batch: {"ce": torch.zeros(1).view(3, 7, -1, -1)}


@pytest.mark.parametrize(
    ("flags", "wrap", "code", "reason"),
    [
        ({"data_path": "nothing.jsonl"}, None, 65, "nothing.jsonl"),
        ({"from_weight": "/nowhere/at/all"}, None, 2, "/nowhere/at/all"),
        ({}, fails_in_a_library, 70, "RuntimeError"),
    ],
)
def test_state_json_tells_of_every_error(tmp_path, rows, flags, wrap, code, reason):
    assert train(1, tmp_path / "run", wrap_objective=wrap, **{"data_path": str(rows), **flags}) == [code]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("failed", code) and reason in state["exit_reason"]
    assert state["pid"] and state["host"] and state["updated_at"]


@pytest.mark.parametrize("content", ["5", "[" * 100_000, "no json"])
def test_an_odd_state_json_hides_no_error(tmp_path, rows, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(content)
    assert train(1, tmp_path / "run", data_path="nothing.jsonl") == [65]
    assert json.loads((tmp_path / "run" / "state.json").read_text())["exit_code"] == 65


def test_a_run_that_is_not_yet_overwritten_stays_as_it_was(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=2) == [0]
    path = tmp_path / "run" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "stopped", "pid": 1}))
    before = path.read_text()
    assert train(1, tmp_path / "run", data_path="nothing.jsonl", overwrite=True) == [65]
    assert path.read_text() == before


def test_a_finished_run_that_cannot_be_gone_on_with_stays_finished(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=2) == [0]
    before = (tmp_path / "run" / "state.json").read_text()
    for wrong in ({"from_resume": "1", "seed": 8}, {"data_path": "nothing.jsonl", "from_resume": "1"}, {}):
        assert train(1, tmp_path / "run", **{"data_path": str(rows), "max_steps": 2, **wrong})[0] in (2, 65)
        assert (tmp_path / "run" / "state.json").read_text() == before


class RaisesValueError:
    """One of a library, which may be a fault of ours, or one of our own, meant for the user."""

    def __init__(self, of_a_library):
        self.of_a_library = of_a_library

    def __call__(self, objective, rank):
        import train_full_sft

        def fail(*_args, **_values):
            return json.loads("{") if self.of_a_library else refuse_changes({}, {"seed": 1}, [])

        train_full_sft.make_optimizer = fail
        return objective


@pytest.mark.parametrize("of_a_library", [False, True])
def test_the_traceback_is_shown_where_the_message_may_not_be_meant_for_the_user(tmp_path, rows, of_a_library):
    wrap = RaisesValueError(of_a_library)
    assert train(1, tmp_path / "run", wrap_objective=wrap, data_path=str(rows)) == [2]
    assert ("Traceback" in log_of(tmp_path / "run")) == of_a_library


def test_what_was_measured_after_a_checkpoint_was_saved_still_ranks_it(tmp_path, capsys):
    """A stop in the middle of a validation saves without its result, which the resumed run adds."""
    from tests.test_control import StopInValidation

    rows = str(write_rows(tmp_path / "rows.jsonl"))
    flags = {"data_path": rows, "val_data_path": rows, "save_interval": "500", "max_steps": 9, "eval_interval": "3"}
    flags["save_top_k"] = 1
    stop = StopInValidation(call=2, victim=0)
    assert train(1, tmp_path / "run", wrap_objective=stop, **flags) == [75]
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0], log_of(tmp_path / "run")
    manifests = sorted((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
    losses = {json.loads(path.read_text())["step"]: json.loads(path.read_text())["metrics"] for path in manifests}
    assert set(losses) == {3, 6, 9} and all(metrics["eval/loss"] > 0 for metrics in losses.values())
    assert checkpoints(["verify", str(tmp_path / "run")]) == 0, capsys.readouterr().err


def test_a_model_that_a_run_begins_with_is_not_overwritten_by_it(tmp_path, rows):
    run, flags = tmp_path / "run", {"data_path": str(rows), "max_steps": 1}
    assert train(1, run, **flags) == [0]
    (run / "model-f32.gguf").write_bytes(b"of the old model")
    before = sha256(run / "final" / "model.safetensors")
    for source in (run, run / "final"):
        for name in ("from_weight", "tokenizer"):
            assert train(1, run, overwrite="1", **flags, **{name: str(source)}) == [2]
            assert f"--overwrite 1 would delete --{name} {source}" in log_of(run)
    assert sha256(run / "final" / "model.safetensors") == before
    assert json.loads((run / "state.json").read_text())["status"] == "completed"
    assert train(1, run, overwrite="1", **flags, seed=8) == [0] and not (run / "model-f32.gguf").exists()


def test_a_model_that_is_not_there_is_missed_before_its_tokenizer(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), from_weight=str(tmp_path / "nowhere")) == [2]
    assert f"no model in {tmp_path}/nowhere: there is no such directory" in log_of(tmp_path / "run")
