"""Runs of several stages, and what follows their course: all of it survives a stop at any step with the same bits."""

import json
import shutil
from pathlib import Path

import pytest

from scripts.checkpoints import main as checkpoints_main
from tests.small_world import (
    log_of,
    records_of,
    result_of,
    resume_from,
    sha256,
    train,
    without_events,
    write_rows,
)

TABLE = [
    {"name": "short", "max_tokens": 18, "batch_size": 2, "learning_rate": 0.02, "lr_schedule": "linear",
     "loss_weights": {"z": 1e-3}},
    {"name": "long", "mini_epochs": 2, "learning_rate": 0.01, "lr_schedule": "mini_epoch", "lr_warmup_epochs": 2,
     "file_fraction": 0.5, "loss_weights": {"ce": 1, "z": "linear(0.001, 0, 0, 2)"}},
    {"name": "last", "max_seq_len": 48, "max_tokens": 48, "accumulation_steps": 2, "learning_rate": 0.005,
     "lr_schedule": "wsd", "warmup_steps": 1},
]  # fmt: skip
POLICIES = {
    "lr_adapt": "adaptive", "lr_adapt_window": 3, "lr_adapt_patience": 2, "lr_adapt_drop_patience": 2,
    "lr_adapt_threshold": 0.5, "ema_decay": 0.9, "early_stopping_patience": 50, "eval_interval": "2", "eval_samples": 0,
}  # fmt: skip
BETWEEN_RESUMES = 5


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    table = home / "stages.json"
    table.write_text(json.dumps(TABLE))
    rows, held_out = write_rows(home / "rows.jsonl"), write_rows(home / "held_out.jsonl", 6, seed=1)
    return {"data_path": str(rows), "val_data_path": str(held_out), "stages": str(table), **POLICIES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(1, run, **flags) == [0], log_of(run)
    return run


def test_each_stage_trains_its_own_rows_at_its_own_rates(whole):
    epochs = records_of(whole, "epoch")
    assert [(r["epoch"], r["stage"], r["mini_epoch"]) for r in epochs] == [(1, 0, 1), (2, 1, 1), (3, 1, 2), (4, 2, 1)]
    steps = records_of(whole, "train")
    weights = {r["step"]: r.get("train/weight_z") for r in steps}
    assert weights[1] == 1e-3 and weights[steps[-1]["step"]] == 0
    announced = [(r["stage"], r["name"]) for r in records_of(whole, "event") if r.get("event") == "stage"]
    assert announced == [(0, "short"), (1, "long"), (2, "last")]
    assert "stage 2/3: long" in log_of(whole)
    report = json.loads((whole / "data_report.json").read_text())
    assert [stage["samples_longer_than_max_tokens"] > 0 for stage in report["stages"]] == [True, False, False]
    assert [stage["samples"] for stage in report["stages"]][1:] == [12, 24]
    state = json.loads((whole / "state.json").read_text())
    assert (state["status"], state["stage"]) == ("completed", 2)


@pytest.mark.parametrize(
    "first", [1, *(pytest.param(first, marks=pytest.mark.slow) for first in range(2, BETWEEN_RESUMES + 1))]
)
def test_a_resume_at_any_step_ends_with_the_same_bits(tmp_path, flags, whole, first):
    expected = result_of(whole)
    last = max(r["step"] for r in records_of(whole, "train"))
    for step in range(first, last, BETWEEN_RESUMES):
        cut = resume_from(whole, step, tmp_path / f"from {step}")
        assert train(1, cut, **flags, from_resume="1") == [0], log_of(cut)
        assert without_events(cut) == without_events(whole), step
    assert {r["event"] for r in records_of(whole, "event")} > {"learning_rate"}, "the multiplier has changed"
    assert any("eval/ema/loss" in r for r in expected["records"])
    another = {**flags, "lr_adapt": "none"}
    assert train(1, tmp_path / "other", **another) == [0]
    assert result_of(tmp_path / "other")["final"] != expected["final"], "and it matters"


@pytest.mark.parametrize(("strategy", "step"), [("ddp", 5), ("fsdp", 9)])
def test_two_processes_resumed_in_any_stage_end_with_the_same_bits(tmp_path, flags, strategy, step):
    flags = {**flags, "strategy": strategy}
    assert train(2, tmp_path / "whole", **flags) == [0, 0], log_of(tmp_path / "whole")
    cut = resume_from(tmp_path / "whole", step, tmp_path / "cut")
    assert train(2, cut, from_resume="1", **flags) == [0, 0], log_of(cut)
    assert without_events(cut) == without_events(tmp_path / "whole")


def test_the_saved_configuration_starts_the_same_run_again(tmp_path, whole, flags):
    from training.config.command_line import parse_config
    from training.config.stages import read_stages

    config, _ = parse_config(["--config", str(whole / "config.yaml")])
    assert [stage.name for stage in read_stages(config)] == ["short", "long", "last"]
    values = {name: value for name, value in vars(config).items() if name not in ("save_dir", "cache_dir")}
    assert train(1, tmp_path / "again", **values) == [0], log_of(tmp_path / "again")
    assert result_of(tmp_path / "again")["final"] == result_of(whole)["final"]


def test_other_stages_are_refused_on_resume(tmp_path, flags, whole):
    cut = resume_from(whole, 3, tmp_path / "cut")
    other = json.dumps([*TABLE[:2], {**TABLE[2], "learning_rate": 0.004}])
    assert train(1, cut, from_resume="1", **{**flags, "stages": other}) == [2]
    assert "--allow_change schedule" in log_of(cut)


# ---------------------------------------------------------------------------------------------------------------------
# What follows the course of a run


STOPS = {
    "epochs": 50, "eval_interval": "2", "lr_schedule": "constant", "early_stopping_patience": 2,
    "early_stopping_min_delta": 0.4,
}  # fmt: skip


def test_early_stopping_ends_a_run_with_its_best_and_last_model_and_stays_ended(tmp_path, rows):
    flags = {
        **STOPS, "data_path": str(rows), "val_data_path": str(rows), "save_interval": "1000"
    }  # fmt: skip
    run = tmp_path / "run"
    assert train(1, run, **flags) == [0], log_of(run)
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["exit_reason"]) == ("completed", "early stopping")
    assert state["step"] < state["total_steps"]
    losses = {r["step"]: r["eval/loss"] for r in records_of(run, "eval")}
    best, last = min(losses, key=losses.get), max(losses)
    assert f"best eval/loss {losses[best]:.4f} after step {best}" in log_of(run)
    assert (sha256(run / "best" / "model.safetensors") == sha256(run / "final" / "model.safetensors")) == (best == last)
    before = sha256(run / "final" / "model.safetensors")
    assert train(1, run, **flags, from_resume="1") == [0]
    assert "is finished, nothing to do" in log_of(run) and sha256(run / "final" / "model.safetensors") == before


def test_a_run_killed_after_early_stopping_and_before_its_export_trains_no_further(tmp_path, rows):
    flags = {
        **STOPS, "data_path": str(rows), "val_data_path": str(rows), "save_interval": "1"
    }  # fmt: skip
    run = tmp_path / "run"
    assert train(1, run, **flags) == [0]
    step, before = json.loads((run / "state.json").read_text())["step"], sha256(run / "final" / "model.safetensors")
    (run / "final" / "model.safetensors").unlink()
    (run / "final").rename(tmp_path / "gone")
    assert train(1, run, **flags, from_resume="1") == [0], log_of(run)
    assert json.loads((run / "state.json").read_text())["step"] == step
    assert sha256(run / "final" / "model.safetensors") == before


def test_more_patience_goes_on_with_a_run_that_was_stopped_and_another_policy_begins_anew(tmp_path, rows):
    flags = {**STOPS, "data_path": str(rows), "val_data_path": str(rows), "lr_adapt": "plateau", "epochs": 8}
    run = tmp_path / "run"
    assert train(1, run, **flags) == [0]
    stopped = json.loads((run / "state.json").read_text())
    assert stopped["exit_reason"] == "early stopping"
    more = {**flags, "early_stopping_patience": 99, "lr_adapt": "adaptive", "from_resume": "1"}
    assert train(1, run, **more) == [2] and "--allow_change schedule" in log_of(run)
    assert train(1, run, **more, allow_change="schedule") == [0], log_of(run)
    assert "what the multiplier remembers is of another kind" in log_of(run)
    state = json.loads((run / "state.json").read_text())
    assert state["step"] == state["total_steps"] > stopped["step"] and state["exit_reason"] == "all steps done"


def test_a_metric_that_no_evaluation_gives_is_an_error(tmp_path, rows):
    flags = {
        "data_path": str(rows),
        "val_data_path": str(rows),
        "early_stopping_patience": 2,
        "monitor_metric": "eval/los",
    }
    assert train(1, tmp_path / "run", **flags) == [2]
    assert "--monitor_metric eval/los: an evaluation gives eval/loss" in log_of(tmp_path / "run")


def test_each_source_of_held_out_data_has_its_own_means(tmp_path, rows):
    one, two = write_rows(tmp_path / "one.jsonl", 5, seed=3), write_rows(tmp_path / "two.jsonl", 9, seed=4)
    flags = {"data_path": str(rows), "val_data_path": f"{one},{two}", "max_steps": 2}
    assert train(1, tmp_path / "run", **flags) == [0]
    (last,) = records_of(tmp_path / "run", "eval")
    assert (
        min(last["eval/one/loss"], last["eval/two/loss"])
        < last["eval/loss"]
        < max(last["eval/one/loss"], last["eval/two/loss"])
    )
    assert train(2, tmp_path / "two ranks", **flags) == [0, 0]
    (shared,) = records_of(tmp_path / "two ranks", "eval")
    assert {"eval/one/loss", "eval/two/loss", "eval/loss", "eval/token_accuracy"} <= shared.keys()


def test_the_weights_of_terms_reach_the_gradient(tmp_path, rows):
    """Twice the loss is twice the gradient, before it is clipped."""
    flags = {"data_path": str(rows), "max_steps": 1, "dropout": 0.0}
    assert train(1, tmp_path / "once", **flags) == train(1, tmp_path / "twice", **flags, loss_weights="ce=2") == [0]
    norms = [records_of(tmp_path / name, "train")[0]["train/grad_norm"] for name in ("once", "twice")]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-6)
    assert train(1, tmp_path / "wrong", **flags, loss_weights="kd=1") == [2]
    assert "--loss_weights kd: the terms are ce, z; kd needs --teacher" in log_of(tmp_path / "wrong")
    assert train(2, tmp_path / "rising", **flags, loss_weights="ce=linear(0, 1, 0, 1)") == [0, 0]
    assert records_of(tmp_path / "rising", "train")[0]["train/grad_norm"] == 0.0


def test_the_time_of_a_run_goes_on_after_a_resume(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=4) == [0]
    cut = resume_from(tmp_path / "run", 2, tmp_path / "cut")
    state = json.loads((cut / "state.json").read_text())
    (cut / "state.json").write_text(json.dumps({**state, "seconds": 5000.0, "status": "stopped"}))
    assert train(1, cut, data_path=str(rows), max_steps=4, from_resume="1") == [0]
    assert 5000.0 < json.loads((cut / "state.json").read_text())["seconds"] < 5100.0
    assert 0.0 < state["seconds"] < 100.0


def test_other_held_out_data_is_refused_where_something_follows_it(tmp_path, rows):
    held_out = shutil.copy(rows, tmp_path / "held_out.jsonl")
    flags = {"data_path": str(rows), "val_data_path": str(held_out), "eval_interval": "2", "max_steps": 4}
    for name, more in (("followed", {"early_stopping_patience": 5}), ("free", {})):
        assert train(1, tmp_path / name, **flags, **more) == [0]
    lines = Path(held_out).read_text().splitlines(keepends=True)
    Path(held_out).write_text("".join(lines[1:]))
    cut = resume_from(tmp_path / "followed", 2, tmp_path / "cut")
    assert train(1, cut, **flags, early_stopping_patience=5, from_resume="1") == [2]
    assert "schedule: the checkpoint has" in log_of(cut) and "measured on" in log_of(cut)
    assert train(1, resume_from(tmp_path / "free", 2, tmp_path / "on"), **flags, from_resume="1") == [0]


def test_held_out_prompts_are_answered_for_show_every_n_evaluations(tmp_path, rows):
    flags = {
        "data_path": str(rows), "val_data_path": str(rows), "epochs": 4, "eval_samples": 5, "eval_samples_interval": 2,
    }  # fmt: skip
    assert train(1, tmp_path / "run", **flags) == [0], log_of(tmp_path / "run")
    evaluations = records_of(tmp_path / "run", "eval")
    assert ["eval/exact_match" in r for r in evaluations] == [True, False, True, False]
    shown = [r for r in records_of(tmp_path / "run", "event") if r.get("event") == "sample"]
    assert len(shown) == 10 and shown[0]["prompt"].endswith("assistant\n") and shown[0]["expected"]
    share = sum(r["exact"] for r in shown if r["step"] == evaluations[2]["step"]) / 5
    assert evaluations[2]["eval/exact_match"] == share
    cut = resume_from(tmp_path / "run", evaluations[0]["step"], tmp_path / "cut")
    assert train(1, cut, **flags, from_resume="1") == [0]
    assert without_events(cut) == without_events(tmp_path / "run")
    assert train(2, tmp_path / "two", **flags) == [0, 0], log_of(tmp_path / "two")


def test_the_moving_average_is_what_the_formula_says_and_can_be_exported(tmp_path, rows):
    from safetensors.torch import load_file

    flags = {"data_path": str(rows), "max_steps": 3, "save_interval": "1", "ema_decay": 0.5, "dropout": 0.0}
    assert train(1, tmp_path / "run", **flags, export_ema=True) == [0], log_of(tmp_path / "run")
    steps = [
        load_file(next(p.glob("model-*.safetensors")))
        for p in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    ]
    averages = [
        load_file(next(p.glob("ema-*.safetensors"))) for p in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    ]
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, average in averages[0].items():
        decay = 2 / 11  # min(0.5, (1 + 1) / (10 + 1)) at the second update
        expected = average * decay + steps[1][name] * (1 - decay)
        assert (averages[1][name] - expected).abs().max() < 1e-6
        assert (averages[2][name] - final[name]).abs().max() == 0 and (steps[2][name] - final[name]).abs().max() > 0
    assert checkpoints_main(["export", str(tmp_path / "run"), "--ema"]) == 0
    exported = tmp_path / "run" / "export-step-00000003" / "model.safetensors"
    assert exported.read_bytes() == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
