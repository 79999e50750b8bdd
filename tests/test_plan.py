"""The plan counts steps and says what is due, also where epochs have different sizes."""

from training.config import make_config
from training.plan import Plan, make_plan
from training.state import LoopState

ROWS = [7, 4, 9]  # of three epochs; with 3 rows per step 3, 2 and 3 steps


def plan_of(window_rows: int = 3, state: LoopState | None = None, **flags) -> Plan:
    config = make_config({"data_path": "x.jsonl", "epochs": 3, **flags})
    return make_plan(config, lambda epoch: ROWS[epoch % 3], window_rows, state or LoopState())


def walk(plan: Plan, interval: str) -> list[int]:
    """The steps after which something is due, asked before and after the turn of the epoch; both must agree."""
    state, due = LoopState(), []
    while state.step < plan.total_steps:
        state.advance(plan.window_rows, plan.rows_of(state.epoch), 0, 0)
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
    assert plan_of(3, state).extra_steps == 0
    plan = plan_of(1, state)
    assert plan.total_steps - state.step == 1 + 9
    assert plan.extra_steps == 4 - (7 + 3)
    assert plan_of(1, state, max_steps=6).total_steps == 6
