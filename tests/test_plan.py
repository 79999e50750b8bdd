"""The plan counts steps and says what is due, also where epochs have different sizes."""

import json

import pytest

from training.config import make_config
from training.config.stages import read_stages
from training.schedule.plan import Plan, make_plan
from training.schedule.train_state import LoopState

ROWS = [7, 4, 9]  # of three epochs; with 3 rows per step 3, 2 and 3 steps


def plan_of(*window_rows: int, state: LoopState | None = None, **flags) -> Plan:
    config = make_config({"data_path": "x.jsonl", **({} if "stages" in flags else {"epochs": 3}), **flags})
    stages = read_stages(config)
    rows = window_rows or [3] * len(stages)
    return make_plan(stages, lambda epoch: ROWS[epoch % 3], rows, state or LoopState())


def walk(plan: Plan, interval: str) -> list[int]:
    """The steps after which something is due, asked before and after the turn of the epoch; both must agree."""
    state, due = LoopState(), []
    while state.step < plan.total_steps:
        state.advance(plan.window_rows(state.epoch), plan.rows_of(state.epoch), 0, 0)
        before = plan.due(state, interval)
        if plan.ends_epoch(state):
            state.next_epoch()
        assert plan.due(state, interval) == before
        due += [state.step] * before
    return due


def test_epochs_of_different_sizes_are_counted():
    plan = plan_of()
    assert (plan.total_steps, plan.epochs) == (8, 3)
    assert [plan.steps_of(epoch) for epoch in range(3)] == [3, 2, 3]
    assert (plan_of(max_steps=4).epochs, plan_of(max_steps=9).epochs) == (2, 4)


def test_intervals_count_steps_or_epochs():
    assert walk(plan_of(), "1epoch") == [3, 5, 8]
    assert walk(plan_of(), "2epoch") == [5, 8]
    assert walk(plan_of(), "3") == [3, 6, 8]
    assert walk(plan_of(max_steps=4), "1epoch") == [3, 4]


def test_another_number_of_rows_per_step_changes_the_steps_that_are_left():
    state = LoopState(step=4, epoch=1, rows=3)  # one row of the second epoch is left
    assert plan_of(3, state=state).extra_steps == 0
    plan = plan_of(1, state=state)
    assert plan.total_steps - state.step == 1 + 9
    assert plan.extra_steps == 4 - (7 + 3)
    assert plan_of(1, state=state, max_steps=6).total_steps == 6


def test_terms_of_the_model_have_a_weight_until_a_stage_says_otherwise():
    stages = [{"name": "a", "loss_weights": "aux=0.5"}, {"name": "b", "loss_weights": "z=1e-4"}]
    config = make_config({"data_path": "x.jsonl", "stages": json.dumps(stages)})
    plan = make_plan(
        read_stages(config), lambda epoch: 3, [3, 3], LoopState(), term_weights={"aux": 0.01, "router_z": 0.0}
    )
    assert plan.loss_weights(1) == {"aux": 0.5, "router_z": 0.0, "z": 0.0}
    assert plan.loss_weights(2) == {"aux": 0.01, "router_z": 0.0, "z": 1e-4}


# ---------------------------------------------------------------------------------------------------------------------
# Stages

TABLE = [
    {"name": "warm", "learning_rate": 1e-3, "lr_schedule": "linear", "min_lr_ratio": 0.5, "loss_weights": "z=0.5"},
    {"name": "long", "repeats": 2, "mini_epochs": 2, "learning_rate": 1e-4, "lr_schedule": "constant"},
    {"name": "last", "learning_rate": 1e-5, "lr_schedule": "cosine", "min_lr_ratio": 0.0,
     "loss_weights": "ce=2, z=linear(0, 1, 0, 1)"},
]  # fmt: skip


def test_each_stage_has_its_own_steps_learning_rates_and_weights():
    plan = plan_of(3, 4, 2, stages=json.dumps(TABLE))  # epochs of 7 | 4, 9, 7, 4 | 9 rows
    assert [(span.steps_before, span.length, span.first_epoch) for span in plan.spans] == [
        (0, 3, 0),
        (3, 7, 1),
        (10, 5, 5),
    ]
    assert (plan.total_steps, plan.epochs, plan.extra_steps) == (15, 6, 0)
    assert [plan.stage_of(epoch) for epoch in range(7)] == [0, 1, 1, 1, 1, 2, 2]
    rates = [plan.lr(step) for step in range(1, 16)]
    assert rates[:3] == pytest.approx([1e-3 * (1 - 0.5 * k / 3) for k in (1, 2, 3)], abs=0)
    assert rates[3:10] == [1e-4] * 7
    assert rates[10] < 1e-5 and rates[-1] == 0.0
    assert plan.loss_weights(3) == {"z": 0.5} and plan.loss_weights(4) == {"z": 0.0}
    assert [plan.loss_weights(step)["z"] for step in range(11, 16)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-15)
    assert plan.loss_weights(11)["ce"] == 2.0


@pytest.mark.parametrize("interval", ["1epoch", "2epoch", "4"])
def test_stages_of_other_steps_are_walked_to_the_end(interval):
    plan = plan_of(3, 4, 2, stages=json.dumps(TABLE))
    ends = {"1epoch": [3, 4, 7, 9, 10, 15], "2epoch": [4, 9, 15], "4": [4, 8, 12, 15]}
    assert walk(plan, interval) == ends[interval]


def test_the_position_within_any_stage_gives_the_same_plan():
    whole, state = plan_of(3, 4, 2, stages=json.dumps(TABLE)), LoopState()
    while state.step < whole.total_steps:
        plan = plan_of(3, 4, 2, stages=json.dumps(TABLE), state=state)
        assert (plan.total_steps, plan.extra_steps, plan.epochs) == (15, 0, 6)
        assert [plan.lr(step) for step in range(1, 16)] == [whole.lr(step) for step in range(1, 16)]
        state.advance(plan.window_rows(state.epoch), plan.rows_of(state.epoch), 0, 0)
        if plan.ends_epoch(state):
            state.next_epoch()


def test_a_staged_run_keeps_the_rows_of_its_steps():
    state = LoopState(step=5, epoch=2, rows=4)
    with pytest.raises(ValueError, match="keeps the rows"):
        plan_of(3, 2, 2, stages=json.dumps(TABLE), state=state)


def test_a_run_longer_than_its_epochs_keeps_counting_them():
    plan = plan_of(3, max_steps=30, epochs=1, lr_schedule="step", lr_interval="2epoch", learning_rate=1.0,
                   loss_weights="z=linear(0, 4, 0, 4)")  # fmt: skip
    assert [plan.lr(step) for step in (1, 5, 6, 10, 11)] == pytest.approx([1, 1, 0.1, 0.1, 0.1], abs=1e-12)
    assert plan.lr(30) < 1e-3 and plan.loss_weights(30) == {"z": 4.0}


def test_repeats_begin_the_schedule_of_mini_epochs_anew():
    row = {"repeats": 2, "mini_epochs": 3, "lr_schedule": "mini_epoch", "lr_warmup_epochs": 2, "learning_rate": 1.0}
    plan = plan_of(9, stages=json.dumps([row]))  # a step per epoch
    assert [plan.lr(step) for step in range(1, 7)] == pytest.approx([0.1, 1.0, 0.95] * 2, abs=1e-15)
    assert [plan.mini_epoch_of(epoch) for epoch in range(6)] == [0, 1, 2] * 2
