"""Each rule speaks up on its curve, names the flag to change, and all of them are silent on runs that are well."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from training.diagnosis.rules import (
    ERROR,
    History,
    data_starvation,
    divergence,
    lr_too_high,
    memory_growth,
    non_finite,
    non_finite_gradient,
    nothing_to_train,
    overfitting,
    smoothed,
    spike,
    stagnation,
    theil_sen,
    throughput_drop,
)

CURVES = Path(__file__).parent / "curves"


def recorded(name):
    """The records of a run of this trainer, and its steps in all."""
    curves = json.loads((CURVES / f"{name}.json").read_text())
    records = []
    for kind in ("train", "eval"):
        columns = curves[kind]
        rows = zip(*columns.values(), strict=True)
        records += [{"kind": kind, **dict(zip(columns, row, strict=True))} for row in rows]
    return sorted(records, key=lambda r: (r["step"], r["kind"] == "eval")), max(curves["train"]["step"])


def made(losses, *, rates=None, norms=None, evals=(), every=1, seed=0):
    """Records of a run with these losses that is otherwise well."""
    steps = np.arange(1, len(losses) + 1) * every
    rng = np.random.default_rng(seed)
    rates = np.full(len(losses), 1e-3) if rates is None else rates
    norms = rng.uniform(0.3, 0.9, len(losses)) if norms is None else norms
    records = [
        {
            "kind": "train", "step": int(step), "time": 1e9 + 2.0 * i, "train/loss": float(losses[i]),
            "train/learning_rate": float(rates[i]), "train/grad_norm": float(norms[i]),
            "train/tokens_per_second": 5000 + 200 * rng.normal(), "train/data_wait_share": 0.01,
            "train/tokens": 4000 * int(step), "train/supervised_tokens": 1600 * int(step),
        }
        for i, step in enumerate(steps)
    ]  # fmt: skip
    records += [{"kind": "eval", "step": step, "eval/loss": loss} for step, loss in evals]
    return sorted(records, key=lambda r: (r["step"], r["kind"] == "eval"))


def alerts_of(records, total_steps, grad_clip=1.0):
    history, found = History(grad_clip, total_steps), []
    for record in records:
        found += [alert for alert in history.look(history.add(record)) if alert is not None]
    return found


def cosine(count, peak=1e-3, warmup=20):
    steps = np.arange(1, count + 1)
    falls = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (count - warmup)))
    return peak * np.where(steps < warmup, steps / warmup, falls)


def noise(count, size, seed=1):
    return size * np.random.default_rng(seed).normal(size=count)


def healthy_curves():
    n = np.arange(600)
    yield "new weights", made(9 * np.exp(-n / 60) + 1.2 + noise(600, 0.15), rates=cosine(600))
    fine_tuned = 0.9 + 0.5 * np.exp(-n / 25) - 0.0003 * n + noise(600, 0.06)
    yield "fine-tuned", made(fine_tuned, rates=cosine(600, 2e-5), norms=2 + np.abs(noise(600, 0.5)))
    steps = 1.4 * np.power(n + 10.0, -0.08) - 0.15 * (n // 200) + noise(600, 0.05)
    yield "a fall at each epoch", made(steps, rates=cosine(600), evals=[(200, 0.9), (400, 0.82), (600, 0.81)])
    power = 6 * np.power(n + 5.0, -0.25)
    constant = np.where(n < 480, 1e-3, 1e-3 * (600 - n) / 120)
    yield "wsd", made(power + noise(600, 0.08), rates=np.maximum(constant, 1e-5))
    yield "learnt by heart", made(3 * np.exp(-n / 30) + 0.01 + np.abs(noise(600, 0.004)), rates=np.full(600, 1e-3))
    tails = 0.1 * np.random.default_rng(3).standard_t(4, size=600)
    yield "batches of one row", made(7 * np.exp(-n / 80) + 2 + tails * (1 + np.exp(-n / 80)), rates=cosine(600))
    logged_seldom = 5 * np.exp(-np.arange(40) / 8) + 1 + noise(40, 0.05)
    yield "logged seldom", made(logged_seldom, rates=cosine(40, warmup=2), every=100)


@pytest.mark.parametrize(("name", "records"), list(healthy_curves()), ids=[name for name, _ in healthy_curves()])
def test_a_healthy_run_hears_nothing(name, records):
    assert [str(alert) for alert in alerts_of(records, records[-1]["step"])] == []


@pytest.mark.parametrize("name", ["demo", "gsm", "const"])
def test_a_recorded_run_that_went_well_hears_nothing(name):
    assert [str(alert) for alert in alerts_of(*recorded(name))] == []


def test_a_recorded_run_with_a_tiny_learning_rate_is_told_to_raise_it():
    alerts = alerts_of(*recorded("cold"))
    assert {alert.rule for alert in alerts} == {"stagnation", "lr_too_low"}
    assert all("--learning_rate ten times" in alert.advice for alert in alerts)


# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_is_divergence():
    n = np.arange(200)
    losses = np.where(n < 100, 5 * np.exp(-n / 40) + 1, 1.4 + 0.1 * (n - 100)) + noise(200, 0.05)
    alerts = alerts_of(made(losses), 200)
    assert {alert.rule for alert in alerts} == {"divergence"}
    first = alerts[0]
    assert first.level == ERROR and 105 < first.step < 125
    assert first.numbers["now"] > 1.5 * first.numbers["best"] and "--learning_rate" in first.advice
    assert divergence(n[:40], losses[:40]) is None


def test_an_explosion_at_the_start_is_found_within_ten_records():
    assert alerts_of(made([9.0, 9.1, *[19.0] * 9]), 100)[0].rule == "divergence"
    assert alerts_of(made([9.0, 9.1, 5000.0, 9.0, 9.0]), 100)[0].step == 3, "what no data explains, at once"


def test_one_bad_batch_is_a_spike_and_no_divergence():
    losses = 2 + noise(100, 0.1)
    losses[70] = 6.0
    alerts = alerts_of(made(losses), 100)
    spikes = [alert for alert in alerts if alert.rule == "spike"]
    assert [alert.step for alert in spikes] == [71] and spikes[0].numbers["z"] > 8
    assert "divergence" not in {alert.rule for alert in alerts}
    assert spike(np.arange(70.0), losses[:70]) is None


def test_a_loss_that_is_no_number_is_told_and_one_that_is_not_logged_is_not():
    alert = non_finite(np.array([1.0, 2.0]), np.array([1.0, math.inf]))
    assert alert.level == ERROR and alert.step == 2 and "--learning_rate" in alert.advice
    assert non_finite(np.array([1.0, 2.0]), np.array([math.inf, 1.0])) is None
    for kind in ("train", "eval"):
        records = [{"kind": kind, "step": step, f"{kind}/loss": 1.0} for step in (1, 2)]
        assert alerts_of([*records, {"kind": kind, "step": 3, "other": 1.0}], 3) == []
        alerts = alerts_of([*records, {"kind": kind, "step": 3, f"{kind}/loss": None}], 3)
        assert [(alert.rule, alert.step) for alert in alerts] == [("non_finite", 3)]


def test_steps_that_are_left_out_are_told_of_whenever_their_number_has_doubled():
    told = [n for n in range(1, 11) if non_finite_gradient(np.arange(1.0, n + 1))]
    assert told == [1, 2, 4, 8]


def test_a_step_that_was_left_out_is_told_of_and_an_overflow_of_fp16_is_not():
    records = made(2 - 0.01 * np.arange(30.0))
    records[-1]["train/grad_norm"] = None  # as the log has what is not finite
    assert alerts_of(records, 30) == []
    records.append({"kind": "event", "event": "non_finite_gradient", "step": 30})
    (alert,) = alerts_of(records, 30)
    assert alert.rule == "non_finite_gradient" and alert.numbers["left_out"] == 1


def test_a_plateau_at_a_constant_rate_stagnates_and_at_a_fallen_one_does_not():
    n = np.arange(600)
    losses = 4 * np.exp(-n / 30) + 2 + noise(600, 0.06)
    alerts = alerts_of(made(losses), 600)
    assert {alert.rule for alert in alerts} == {"stagnation"}
    assert "Let the learning rate fall" in alerts[0].advice and 150 < alerts[0].step < 500
    assert alerts[0].numbers["low"] <= 0 <= alerts[0].numbers["high"]
    late = np.where(n < 150, 1e-3, 1e-4)
    steps = n + 1.0
    assert stagnation(steps, losses, np.full(600, 1e-3), first=6.0) and not stagnation(steps, losses, late, first=6.0)


def test_slow_progress_under_noise_is_no_stagnation():
    n = np.arange(600)
    assert alerts_of(made(3.0 - 0.0012 * n + noise(600, 0.1)), 20_000) == []


EVAL_STEPS = range(50, 501, 50)


def test_held_out_loss_that_rises_while_training_falls_is_overfitting():
    n = np.arange(500)
    losses = 3 * np.exp(-n / 120) + 0.1 + noise(500, 0.02)
    rising = [2.0, 1.6, 1.4, 1.35, 1.37, 1.42, 1.5, 1.6, 1.7, 1.8]
    alerts = alerts_of(made(losses, evals=zip(EVAL_STEPS, rising, strict=True)), 500)
    assert {alert.rule for alert in alerts} == {"overfitting"}
    assert alerts[0].step == 350 and alerts[0].numbers["best_step"] == 200
    assert "--early_stopping_patience" in alerts[0].advice and "--save_top_k" in alerts[0].advice


@pytest.mark.parametrize(
    "held_out",
    [
        [2.0, 1.6, 1.4, 1.35, 1.36, 1.35, 1.36, 1.355, 1.36, 1.352],  # level
        [2.0, 1.6, 1.4, 1.35, 1.9, 1.7, 1.6, 1.5, 1.45, 1.4],  # recovers
        [2.0, 1.6, math.nan, 1.35, 1.34, 1.33, 1.3, 1.3, 1.29, 1.28],
    ],
)
def test_other_courses_of_the_held_out_loss_are_not(held_out):
    losses = 3 * np.exp(-np.arange(500) / 120) + 0.1 + noise(500, 0.02)
    alerts = alerts_of(made(losses, evals=zip(EVAL_STEPS, held_out, strict=True)), 500)
    assert [alert for alert in alerts if alert.rule == "overfitting"] == []


def test_where_training_does_not_fall_either_it_is_no_overfitting():
    steps, evals = np.arange(1.0, 501.0), np.array([1.5, 1.4, 1.5, 1.6, 1.7])
    losses = np.full(500, 2.0)
    assert overfitting(np.array([100.0, 200, 300, 400, 500]), evals, steps, losses) is None


def test_steps_that_are_all_clipped_without_progress_have_too_high_a_rate():
    n = np.arange(200)
    losses = np.maximum(9 - 0.2 * n, 4.0) + noise(200, 0.4)
    alerts = alerts_of(made(losses, norms=6 + np.abs(noise(200, 3.0))), 1000)
    assert "lr_too_high" in {alert.rule for alert in alerts}
    alert = next(alert for alert in alerts if alert.rule == "lr_too_high")
    assert alert.numbers["clipped_share"] == 1.0 and "--grad_clip 1" in alert.advice
    steps, rates = n + 1.0, np.full(200, 1e-3)
    assert lr_too_high(steps, np.full(200, 6.0), losses, rates, clip=0.0, first=9.0) is None
    assert lr_too_high(steps, np.full(200, 6.0), 9 - 0.02 * n, rates, clip=1.0, first=9.0) is None, "it falls"


def test_a_straight_line_that_leads_nowhere_has_too_low_a_rate():
    losses = 3.0 - 2e-4 * np.arange(150) + noise(150, 0.005)
    alerts = alerts_of(made(losses), 1000)
    assert "lr_too_low" in {alert.rule for alert in alerts}
    assert alerts_of(made(losses), 100_000) == [], "there, the line leads far"


def test_a_third_of_the_time_without_data_is_starvation():
    steps, times = np.arange(1.0, 41.0), 2.0 * np.arange(40)
    alert = data_starvation(steps, np.full(40, 0.4), times)
    assert alert.numbers["wait_share"] == 0.4 and "--num_workers" in alert.advice
    assert data_starvation(steps, np.full(40, 0.1), times) is None
    assert data_starvation(steps, np.full(40, 0.4), 0.1 * times) is None, "too short to tell"


def test_a_lasting_fall_of_throughput_is_told_and_a_short_one_is_not():
    steps, times = np.arange(1.0, 61.0), 5.0 * np.arange(60)
    rates = np.where(steps > 45, 2000.0, 5000.0)
    alert = throughput_drop(steps, rates, times)
    assert (alert.numbers["now"], alert.numbers["before"]) == (2000.0, 5000.0) and "nvidia-smi" in alert.advice
    assert throughput_drop(steps[:48], rates[:48], times[:48]) is None
    assert throughput_drop(steps, rates, 0.1 * times) is None


def test_memory_that_goes_on_rising_is_told_and_a_step_up_is_not():
    steps = np.arange(1.0, 61.0)
    alert = memory_growth(steps, 1 + 0.02 * steps, "main")
    assert alert.numbers["last_gib"] > alert.numbers["first_gib"] and "--num_workers 0" in alert.advice
    assert memory_growth(steps, np.where(steps > 40, 3.0, 1.0), "main") is None
    assert memory_growth(steps, 1 + 0.001 * steps, "main") is None
    records = [{"kind": "system", "step": int(s), "system/ram_used_gib": 1 + 0.02 * s} for s in steps]
    assert {alert.rule for alert in alerts_of(records, 60)} == {"memory_growth"}


def test_tokens_that_are_never_supervised_are_told():
    steps = np.arange(1.0, 31.0)
    assert nothing_to_train(steps, 1000 * steps, 0 * steps).level == ERROR
    alert = nothing_to_train(steps, 1000 * steps, 2 * steps)
    assert alert.level == "warning" and "scripts.inspect_data" in alert.advice
    assert nothing_to_train(steps, 1000 * steps, 50 * steps) is None


def test_a_new_stage_begins_a_new_curve():
    first, second = made(0.5 + noise(60, 0.02)), made(3.0 + noise(60, 0.05) - 0.02 * np.arange(60))
    second = [{**record, "step": record["step"] + 60} for record in second]
    announced = {"kind": "event", "event": "stage", "step": 61, "stage": 1, "name": "hard"}
    assert "divergence" in {alert.rule for alert in alerts_of([*first, *second], 120)}
    assert "divergence" not in {alert.rule for alert in alerts_of([*first, announced, *second], 120)}


def test_every_alert_is_strict_json_and_says_which_flag_to_change():
    n = np.arange(300)
    bad = made(np.where(n < 150, 3.0, 30.0) + noise(300, 0.1), norms=np.full(300, 9.0))
    for alert in alerts_of([*bad, *recorded("cold")[0]], 300):
        json.dumps(alert.numbers, allow_nan=False)
        assert "--" in alert.advice and alert.rule in str(alert)


def test_measures():
    assert theil_sen(np.arange(50.0), 2 * np.arange(50.0))[0] == 2.0
    slope, low, high = theil_sen(np.arange(100.0), noise(100, 1.0))
    assert low < 0.0 < high and low < slope < high
    values = np.array([4.0, math.nan, 2.0, 2.0])
    assert np.allclose(smoothed(values, span=3), [4.0, 4.0, 2.4, (0.125 * 4 + 0.5 * 2 + 2) / 1.625])
    assert np.isnan(smoothed(np.array([math.nan, 1.0]))[0])
    assert np.allclose(smoothed(np.full(1000, 3.0)), 3.0)
