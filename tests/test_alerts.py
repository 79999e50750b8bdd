"""Alerts of real runs: found while they train, written once, said once, and able to stop all ranks at one step."""

import json

import pytest

from tests.small_world import log_of, records_of, result_of, resume_from, train
from training.control.requests import ALERT, STOP_REASONS, SignalFlags, Stopped, Wishes
from training.diagnosis.alerts import AlertBook, read_alerts
from training.records.metrics import read_records

WILD = {"learning_rate": 10.0, "max_steps": 60, "save_interval": "20", "eval_interval": "500", "dropout": 0.0}


def state_of(save_dir):
    return json.loads((save_dir / "state.json").read_text())


@pytest.fixture(scope="module")
def wild(rows, tmp_path_factory):
    """A run whose learning rate is a thousand times too high."""
    save_dir = tmp_path_factory.mktemp("wild") / "run"
    assert train(1, save_dir, data_path=str(rows), **WILD) == [0], log_of(save_dir)
    return save_dir


def test_a_learning_rate_far_too_high_diverges_and_that_is_said_once(wild):
    alerts = read_alerts(wild)
    (divergence,) = [alert for alert in alerts if alert["rule"] == "divergence"]
    assert divergence["level"] == "error" and divergence["step"] < 30
    assert {"level", "rule", "step", "time", "numbers", "advice"} <= divergence.keys()
    assert divergence["numbers"]["now"] > 1.5 * divergence["numbers"]["best"]
    assert log_of(wild).count("error: divergence at step") == 1
    assert "--learning_rate" in divergence["advice"]
    assert state_of(wild)["status"] == "completed", "--on_alert log only logs"
    for line in (wild / "alerts.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_alerts_change_nothing_that_is_trained(wild, rows, tmp_path):
    """The same run, cut off and resumed: no alert stands twice, none is missing, and it ends at the same bits."""
    copy = resume_from(wild, 20, tmp_path / "copy")
    assert train(1, copy, data_path=str(rows), from_resume="1", **WILD) == [0], log_of(copy)

    def said(save_dir):
        return [{k: v for k, v in alert.items() if k != "time"} for alert in read_alerts(save_dir)]

    assert said(copy) == said(wild)
    assert result_of(copy)["final"] == result_of(wild)["final"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_stops_all_ranks_at_one_step_with_its_name(rows, tmp_path, world_size):
    save_dir = tmp_path / "run"
    flags = {**WILD, "data_path": str(rows), "on_alert": "stop", "save_interval": "500", "max_steps": 16}
    assert train(world_size, save_dir, **flags) == [0] * world_size, log_of(save_dir)
    state, (alert, *_) = state_of(save_dir), [a for a in read_alerts(save_dir) if a["level"] == "error"]
    assert state["status"] == "stopped" and state["step"] == alert["step"] < 30
    assert state["exit_reason"].startswith(f"{ALERT}: error: {alert['rule']} at step {alert['step']}")
    assert [p.name for p in (save_dir / "checkpoints").glob("step-*")] == [f"step-{alert['step']:08d}"]
    assert not (save_dir / "final").exists()
    assert "--on_alert stop: stopped after step" in log_of(save_dir)
    flags = {**flags, "from_resume": "1"}
    assert train(world_size, save_dir, **flags) == [0] * world_size, log_of(save_dir)
    assert state_of(save_dir)["status"] == "completed", "who goes on has heard of it"
    assert len([a for a in read_alerts(save_dir) if a["step"] == alert["step"] and a["rule"] == alert["rule"]]) == 1


def test_a_learning_rate_of_a_thousand_ends_before_a_gradient_is_no_number(rows, tmp_path):
    flags = {**WILD, "learning_rate": 1000.0, "data_path": str(rows)}
    assert train(1, tmp_path / "logged", **flags) == [70]
    assert {"divergence", "non_finite_gradient"} <= {alert["rule"] for alert in read_alerts(tmp_path / "logged")}
    assert train(1, tmp_path / "stopped", on_alert="stop", **flags) == [0]
    assert state_of(tmp_path / "stopped")["step"] == 2


def test_a_healthy_run_hears_nothing(rows, tmp_path):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=40, on_alert="stop") == [0]
    assert (tmp_path / "run" / "alerts.jsonl").read_text() == ""
    assert "error" not in log_of(tmp_path / "run") and "warning" not in log_of(tmp_path / "run")


def test_any_rank_that_wishes_it_stops_the_run():
    alarmed = Wishes(SignalFlags(), None, alarmed=lambda: True)
    assert sum(alarmed.look()) == 1
    with pytest.raises(Stopped, match=ALERT):
        alarmed.stop_if_wished(alarmed.look())
    assert STOP_REASONS.index(ALERT) < len(STOP_REASONS) - 1, "the run is not complete"


def record(step, loss, **more):
    return {"kind": "train", "step": step, "time": 1e9 + step, "train/loss": loss, "train/learning_rate": 1.0, **more}


def book_of(tmp_path, records=(), step=0, whole_step=True, stops=False):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(each) + "\n" for each in records))
    said = []
    book = AlertBook(tmp_path / "alerts.jsonl", stops=stops)
    book.start(read_records(metrics), step, whole_step, 1000, said.append)
    return book, said


def test_a_rule_speaks_again_only_after_a_silence(tmp_path):
    book, said = book_of(tmp_path)
    for step in range(1, 200):
        book.log(record(step, None if step in (10, 11, 12, 30, 120) else 2.0))
    assert [alert["step"] for alert in read_alerts(tmp_path)] == [10, 120]
    assert len(said) == 2


def test_a_resumed_run_remembers_what_has_been_said(tmp_path):
    losses = {step: None if step in (40, 45) else 2.0 for step in range(1, 61)}
    book, _ = book_of(tmp_path)
    for step, loss in losses.items():
        book.log(record(step, loss))
    earlier = [record(step, loss) for step, loss in losses.items() if step <= 42]
    book, said = book_of(tmp_path, earlier, step=42)
    for step, loss in losses.items():
        if step > 42:
            book.log(record(step, loss))
    assert [alert["step"] for alert in read_alerts(tmp_path)] == [40] and not said


def test_alerts_are_cut_back_with_the_metrics(tmp_path):
    book, _ = book_of(tmp_path)
    for step in (1, 2):
        book.log(record(step, 2.0))
    book.log(record(3, None))
    book.log({"kind": "eval", "step": 3, "time": 1e9, "eval/loss": 2.0})
    assert [alert["step"] for alert in read_alerts(tmp_path)] == [3]
    book_of(tmp_path, [record(1, 2.0), record(2, 2.0)], step=2)
    assert read_alerts(tmp_path) == []


def test_only_errors_stop(tmp_path):
    book, said = book_of(tmp_path, stops=True)
    for step in range(1, 40):
        book.log(record(step, 9.0 if step == 30 else 2.0 + 0.01 * (step % 3)))
    assert [alert["rule"] for alert in read_alerts(tmp_path)] == ["spike"] and not book.wants_stop()
    book.log(record(40, None))
    assert book.wants_stop() and book.stopping_for.rule == "non_finite" and len(said) == 2


def test_a_broken_rule_ends_no_run(tmp_path, monkeypatch, caplog):
    from training.records.metrics import MetricsLog

    log = MetricsLog(tmp_path / "metrics.jsonl")
    book, _ = book_of(tmp_path)
    log.sinks.append(book)
    monkeypatch.setattr(book.history, "look", lambda kind: 1 / 0)
    log.write("train", 1, **{"train/loss": 1.0})
    log.write("train", 2, **{"train/loss": 1.0})
    assert len(records_of(tmp_path)) == 2 and caplog.text.count("AlertBook failed and is dropped") == 1
