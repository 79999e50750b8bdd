"""The learning rate is closed form: literal values, and equality with what a run has logged."""

import math

import pytest

from tests.small_world import result_of, resume_from, train, write_rows
from training.schedules import lr_factor, warmup_steps_of


def test_cosine_without_warmup():
    factors = [lr_factor(s, 4, schedule="cosine", min_lr_ratio=0.0) for s in range(1, 5)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(1, 5)], abs=0)
    assert factors[-1] == 0.0


def test_warmup_rises_from_the_first_step_and_the_floor_is_reached_at_the_last():
    factors = [lr_factor(s, 12, schedule="cosine", warmup_steps=4, min_lr_ratio=0.1) for s in range(1, 13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[7] == pytest.approx(0.55, abs=1e-15)  # half way down
    assert factors[-1] == 0.1
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_linear_and_constant():
    assert [lr_factor(s, 4, schedule="linear", min_lr_ratio=0.0) for s in range(1, 5)] == [0.75, 0.5, 0.25, 0.0]
    assert [lr_factor(s, 3, schedule="constant", warmup_steps=2) for s in range(1, 4)] == [0.5, 1.0, 1.0]


def test_warmup_may_be_a_share_of_the_run():
    assert warmup_steps_of(5, 0.0, 100) == 5
    assert warmup_steps_of(0, 0.03, 110) == 4
    assert warmup_steps_of(500, 0.0, 100) == 100


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
