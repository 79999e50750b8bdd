"""The learning rate is closed form: literal values, torch's own curves, and equality with what a run has logged."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_world import result_of, resume_from, train, write_rows
from training.config.config import LR_SCHEDULES
from training.schedule.learning_rate import SHAPES, LRSchedule, lr_factor, warmup_steps_of


def curve(schedule: LRSchedule, total_steps: int, steps_per_epoch: int = 10**9) -> list[float]:
    """The factor of every step, in epochs of so many steps."""
    return [lr_factor(schedule, step, total_steps, (step - 1) // steps_per_epoch) for step in range(1, total_steps + 1)]


def by_epoch(schedule: LRSchedule, epochs: int) -> list[float]:
    """The factor of every epoch of three steps, which all have the same."""
    factors = curve(schedule, 3 * epochs, steps_per_epoch=3)
    assert factors[::3] == factors[1::3] == factors[2::3]
    return factors[::3]


# ---------------------------------------------------------------------------------------------------------------------
# Literal values


def test_every_kind_of_the_command_line_has_a_shape():
    assert set(SHAPES) == set(LR_SCHEDULES)


def test_cosine_without_warmup():
    factors = curve(LRSchedule("cosine", floor=0.0), 4)
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(1, 5)], abs=0)
    assert factors[-1] == 0.0


def test_warmup_rises_from_the_first_step_and_the_floor_is_reached_at_the_last():
    factors = curve(LRSchedule("cosine", warmup_steps=4), 12)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[7] == pytest.approx(0.55, abs=1e-15)  # half way down
    assert factors[-1] == 0.1
    assert factors[4:] == sorted(factors[4:], reverse=True)


LITERAL = {  # 2 steps of warmup and 8 more in epochs of 2, floor 0.1
    "cosine": (LRSchedule("cosine", 2), {3: 0.96574579, 6: 0.55, 10: 0.1}),
    "linear": (LRSchedule("linear", 2), {3: 0.8875, 6: 0.55, 9: 0.2125, 10: 0.1}),
    "constant": (LRSchedule("constant", 2), {3: 1.0, 10: 1.0}),
    "cosine_restarts": (
        LRSchedule("cosine_restarts", 2, cycles=2),
        {3: 0.86819805, 5: 0.23180195, 6: 0.1, 7: 0.86819805, 10: 0.1},
    ),
    "wsd": (LRSchedule("wsd", 2, decay_ratio=0.5), {3: 1.0, 6: 1.0, 7: 0.775, 8: 0.55, 10: 0.1}),
    "polynomial": (LRSchedule("polynomial", 2, power=3.0), {3: 0.1 + 0.9 * 0.669921875, 6: 0.2125, 10: 0.1}),
    "step": (LRSchedule("step", 2, interval="2epoch", gamma=0.5), {3: 1.0, 4: 1.0, 5: 0.5, 8: 0.5, 9: 0.25, 10: 0.25}),
    "multistep": (
        LRSchedule("multistep", 2, milestones=("3", "4epoch")),
        {3: 1.0, 5: 1.0, 6: 0.1, 8: 0.1, 9: 0.01, 10: 0.01},
    ),
    "exponential": (LRSchedule("exponential", 2), {3: 0.95, 4: 0.95, 5: 0.9025, 9: 0.81450625, 10: 0.81450625}),
    "one_cycle": (
        LRSchedule("one_cycle", 2, peak_ratio=0.375, start_ratio=0.2, floor=0.0),
        {3: 0.2, 4: 0.6, 5: 1.0, 6: 0.90450850, 10: 0.0},
    ),
    "mini_epoch": (
        LRSchedule("mini_epoch", 2, warmup_epochs=4, gamma=0.5),
        {3: 0.4, 5: 0.7, 7: 1.0, 8: 1.0, 9: 0.5, 10: 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LR_SCHEDULES)
def test_literal_values_after_two_steps_of_warmup(kind):
    schedule, expected = LITERAL[kind]
    factors = dict(enumerate(curve(schedule, 10, steps_per_epoch=2), start=1))
    assert (factors[1], factors[2]) == (0.5, 1.0), "the edges of warmup"
    assert {step: factors[step] for step in expected} == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kind", ["cosine", "cosine_restarts", "linear", "polynomial", "wsd", "one_cycle"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 1 / 3, 1.0])
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 7), (3, 100), (99, 100)])
def test_the_last_step_is_at_the_floor_exactly(kind, floor, warmup_steps, total_steps):
    assert lr_factor(LRSchedule(kind, warmup_steps, floor), total_steps, total_steps) == floor


@pytest.mark.parametrize("kind", LR_SCHEDULES)
def test_a_run_may_be_all_warmup(kind):
    assert curve(LRSchedule(kind, warmup_steps=4), 4) == [0.25, 0.5, 0.75, 1.0]


def test_warmup_may_be_a_share_of_the_run():
    assert warmup_steps_of(5, 0.0, 100) == 5
    assert warmup_steps_of(0, 0.03, 110) == 4
    assert warmup_steps_of(500, 0.0, 100) == 100


def test_step_falls_by_ten_first_at_epoch_30_and_never_at_0():
    factors = by_epoch(LRSchedule("step"), 91)
    assert factors[:30] == [1.0] * 30
    assert factors[30:60] == [0.1] * 30
    assert factors[60:90] == pytest.approx([0.01] * 30, rel=1e-12)
    assert factors[90] == pytest.approx(0.001, rel=1e-12)


def test_mini_epoch_rises_from_a_tenth_in_ten_and_falls_by_a_twentieth_first_in_the_eleventh():
    factors = by_epoch(LRSchedule("mini_epoch"), 40)
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)], abs=1e-15)
    assert factors[10] == 0.95
    assert factors[9:] == pytest.approx([0.95**n for n in range(31)], rel=1e-12)
    assert by_epoch(LRSchedule("mini_epoch"), 10) == factors[:10], "a stage of ten never falls"


def test_mini_epoch_can_rise_from_any_rate_to_any_other():
    """start + (target - start) epoch / warmup, from 1e-5 to 5e-4 in ten epochs."""
    factors = by_epoch(LRSchedule("mini_epoch", start_ratio=0.02, warmup_epochs=11, gamma=1.0), 20)
    expected = [1e-5 + (5e-4 - 1e-5) * epoch / 10 for epoch in range(11)] + [5e-4] * 9
    assert [5e-4 * factor for factor in factors] == pytest.approx(expected, rel=1e-12)


def test_a_cycle_ends_at_the_floor_and_the_next_begins_at_the_top():
    factors = curve(LRSchedule("cosine_restarts", cycles=3, floor=0.2), 30)
    assert [step for step, factor in enumerate(factors, start=1) if factor == 0.2] == [10, 20, 30]
    assert factors[:10] == pytest.approx(factors[10:20], abs=1e-15)
    assert factors[10] > 0.97


# ---------------------------------------------------------------------------------------------------------------------
# torch draws the same curves


def by_torch(make, steps: int) -> list[float]:
    """The learning rates of `steps` updates under a scheduler of torch, from 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


torch_lr = torch.optim.lr_scheduler
SAME = {  # our curve, torch's, and how many steps later ours is where torch's is
    "step": (LRSchedule("step", interval="7", gamma=0.3), lambda o: torch_lr.StepLR(o, 7, 0.3), 0),
    "multistep": (
        LRSchedule("multistep", milestones=("5", "20", "21"), gamma=0.5),
        lambda o: torch_lr.MultiStepLR(o, [5, 20, 21], 0.5), 0,
    ),
    "exponential": (
        LRSchedule("exponential", interval="1", gamma=0.9), lambda o: torch_lr.ExponentialLR(o, 0.9), 0,
    ),
    "one_cycle": (
        LRSchedule("one_cycle", floor=0.04 / 1e4), lambda o: torch_lr.OneCycleLR(o, 1.0, total_steps=40), 0,
    ),
    "one_cycle, other numbers": (
        LRSchedule("one_cycle", peak_ratio=0.55, start_ratio=0.1, floor=0.1 / 50),
        lambda o: torch_lr.OneCycleLR(o, 1.0, 40, pct_start=0.55, div_factor=10, final_div_factor=50), 0,
    ),
    "cosine": (LRSchedule("cosine", floor=0.25), lambda o: torch_lr.CosineAnnealingLR(o, 40, eta_min=0.25), 1),
    "cosine_restarts": (
        LRSchedule("cosine_restarts", cycles=4, floor=0.25),
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 10, eta_min=0.25), 1,
    ),
    "linear": (LRSchedule("linear", floor=0.25), lambda o: torch_lr.LinearLR(o, 1.0, 0.25, total_iters=40), 1),
    "polynomial": (
        LRSchedule("polynomial", floor=0.0, power=1.7), lambda o: torch_lr.PolynomialLR(o, 40, power=1.7), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_curve_is_that_of_torch(name):
    """What falls with progress reaches the floor at the last step, where torch would reach it one step later."""
    schedule, make, later = SAME[name]
    ours, theirs = curve(schedule, 40), by_torch(make, 40)
    for ours_at, theirs_at in zip(ours[: 40 - later], theirs[later:], strict=True):
        restarts = name == "cosine_restarts" and theirs_at == 1.0  # where a cycle of ours is at its floor
        assert (0.25 if restarts else theirs_at) == pytest.approx(ours_at, rel=1e-9)


def test_epochs_are_counted_as_torch_does_where_its_scheduler_steps_by_epoch():
    schedule = LRSchedule("multistep", milestones=("3epoch", "8epoch"))
    assert by_epoch(schedule, 12) == pytest.approx(by_torch(lambda o: torch_lr.MultiStepLR(o, [3, 8]), 12), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# For any numbers


@st.composite
def positions(draw):
    """A schedule of any kind with any numbers that the flags let through, and a place in a run."""
    interval = st.none() | st.integers(1, 10**6).flatmap(lambda n: st.sampled_from([str(n), f"{n}epoch"]))
    total_steps = draw(st.integers(1, 10**9))
    share = st.floats(0.0, 1.0)
    above_zero = st.floats(0.0, 1.0, exclude_min=True)
    schedule = LRSchedule(
        kind=draw(st.sampled_from(LR_SCHEDULES)),
        warmup_steps=warmup_steps_of(draw(st.integers(0, 10**9)), draw(share), total_steps),
        floor=draw(share),
        cycles=draw(st.integers(1, 10**6)),
        decay_ratio=draw(above_zero),
        power=draw(st.floats(0.0, 1e300, exclude_min=True)),
        interval=draw(interval),
        gamma=draw(st.none() | above_zero),
        milestones=tuple(each or "1" for each in draw(st.lists(interval, max_size=4))),
        peak_ratio=draw(share),
        start_ratio=draw(st.none() | above_zero),
        warmup_epochs=draw(st.integers(1, 10**6)),
    )
    return schedule, draw(st.integers(1, total_steps)), total_steps, draw(st.integers(0, 10**9))


@settings(max_examples=600, deadline=None)
@given(positions())
def test_any_factor_is_finite_and_between_0_and_1(position):
    factor = lr_factor(*position)
    assert math.isfinite(factor) and 0.0 <= factor <= 1.0, factor


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def closed_form(step: int, total: int) -> float:
    """The same formula written a second time, for warmup 3, peak 0.01 and floor 0.1."""
    if step <= 3:
        return 0.01 * (step / 3)
    return 0.01 * (0.1 + (1.0 - 0.1) * 0.5 * (1.0 + math.cos(math.pi * ((step - 3) / (total - 3)))))


def test_a_run_logs_the_closed_form_before_and_after_a_resume(tmp_path):
    flags = {"data_path": str(write_rows(tmp_path / "rows.jsonl")), "warmup_steps": 3}
    assert train(1, tmp_path / "whole", **flags) == [0]
    cut = resume_from(tmp_path / "whole", 4, tmp_path / "cut")
    assert train(1, cut, from_resume="1", **flags) == [0]
    for run in (tmp_path / "whole", cut):
        rates = {r["step"]: r["train/learning_rate"] for r in result_of(run)["records"] if r["kind"] == "train"}
        total = max(rates)
        assert total > 8 and sorted(rates) == list(range(1, total + 1))
        assert rates == {step: closed_form(step, total) for step in rates}
        assert rates != {step: closed_form(step, total + 1) for step in rates}
