"""The multiplier of the learning rate: at which observation it changes, to what, and that a resume changes nothing.

Observations are counted from 0; the first is the first best, so 3 of them without improvement end with number 3.
"""

import functools
import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from training.config import Config
from training.schedule.adaptive import Adaptive, Change, Plateau, make_multiplier, variance_and_fall

SMALL = {
    "lr_adapt_patience": 5, "lr_adapt_factor": 0.5, "lr_adapt_threshold": 0.1, "lr_adapt_window": 3,
    "lr_adapt_boost": 2.0, "lr_adapt_drop": 0.75, "lr_adapt_drop_patience": 4, "min_lr": 0.0, "max_lr_factor": 4.0,
}  # fmt: skip


def multiplier(kind: str, **flags: Any) -> Plateau:
    """One with the flags of SMALL, or as a user gets it for `defaults=True`."""
    small = {} if flags.pop("defaults", False) else SMALL
    made = make_multiplier(config_of(lr_adapt=kind, **{**small, **flags}))
    assert made is not None
    return made


config_of = functools.cache(Config)


def decisions(made: Plateau, values: Iterable[float], scheduled_lr: float = 1e-3, start: int = 0) -> list[Any]:
    """(number of the observation, new factor) of each change."""
    changes = ((i, made.observe(value, scheduled_lr)) for i, value in enumerate(values, start))
    return [(i, change.after) for i, change in changes if change]


def noise(width: float, count: int) -> list[float]:
    generator = random.Random(7)
    return [width * (generator.random() - 0.5) for _ in range(count)]


CURVES = {
    "stagnating": [max(1.0, 3.0 - 0.2 * i) + jitter for i, jitter in enumerate(noise(0.002, 160))],
    "improving": [3.0 * 0.98**i for i in range(160)],
    "noisy": [2.0 + jitter for jitter in noise(0.6, 160)],
    "diverging": [1.0 + 0.05 * i for i in range(160)],
    "v-shaped": [1.0 + 0.05 * abs(i - 60) for i in range(160)],
    "broken": [math.nan, *[2.0] * 25, math.nan, *[2.0] * 50, math.inf, -math.inf, *[math.nan] * 60],
}
# With the defaults. Number 10 is the best of "stagnating", 0 of "diverging", 60 of "v-shaped"; after number 8 "noisy"
# improves at 78, 106 and 130.
EXPECTED = {
    ("plateau", "stagnating"): [(60, 0.7), (110, 0.49)],
    ("plateau", "improving"): [],
    ("plateau", "noisy"): [(58, 0.7)],
    ("plateau", "diverging"): [(50, 0.7), (100, 0.49), (150, 0.343)],
    ("plateau", "v-shaped"): [(110, 0.7)],
    ("plateau", "broken"): [(51, 0.7), (101, 0.49)],
    # a boost after a window, two more 21 apart, the last one up to the cap; from there drops after 30, boosts after 21
    ("adaptive", "stagnating"): [(29, 1.5), (50, 2.25), (71, 3.0), (101, 2.4), (122, 3.0), (152, 2.4)],
    ("adaptive", "improving"): [],
    ("adaptive", "noisy"): [(38, 0.8), (59, 0.56)],
    # drop after 30; cut due at 50 and possible at 51; drop due at 60 and possible at 72; cut 50 after 51, and so on
    ("adaptive", "diverging"): [(30, 0.8), (51, 0.56), (72, 0.448), (101, 0.3136), (122, 0.25088), (151, 0.175616)],
    ("adaptive", "v-shaped"): [(90, 0.8), (111, 0.56), (132, 0.448)],
    # boost at 20; the NaN at 26 empties the window, which is full again at 46 and 67; the last one without new values
    ("adaptive", "broken"): [(20, 1.5), (46, 2.25), (67, 3.0), (97, 2.4), (118, 1.68)],
}

ROUGH = [1.0, *[5.0, 9.0] * 30]  # variance 4 or more: no stagnation, and never better than the first


def near(expected: list[Any]) -> list[Any]:
    return [(i, pytest.approx(factor, rel=1e-12)) for i, factor in expected]


@pytest.mark.parametrize(("kind", "curve"), EXPECTED)
def test_decisions_on_curves(kind, curve):
    assert decisions(multiplier(kind, defaults=True), CURVES[curve]) == near(EXPECTED[kind, curve])


@pytest.mark.parametrize(("kind", "curve"), EXPECTED)
def test_in_mode_max_the_mirrored_curve_gives_the_same_decisions(kind, curve):
    mirrored = [-value for value in CURVES[curve]]
    assert decisions(multiplier(kind, defaults=True, monitor_mode="max"), mirrored) == near(EXPECTED[kind, curve])
    if curve in ("stagnating", "diverging", "v-shaped"):
        assert decisions(multiplier(kind, defaults=True), mirrored) != near(EXPECTED[kind, curve])


@pytest.mark.parametrize(("kind", "curve"), EXPECTED)
def test_an_interruption_after_any_observation_changes_nothing(kind, curve):
    values, whole = CURVES[curve], near(EXPECTED[kind, curve])
    uninterrupted, forgot = multiplier(kind, defaults=True), 0
    assert decisions(uninterrupted, values) == whole
    for k in range(len(values) + 1):
        first = multiplier(kind, defaults=True)
        told = decisions(first, values[:k])
        state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
        second, forgetful = multiplier(kind, defaults=True), multiplier(kind, defaults=True)
        second.load_state_dict(state)
        assert told + decisions(second, values[k:], start=k) == whole
        assert second.state_dict() == uninterrupted.state_dict()
        forgot += told + decisions(forgetful, values[k:], start=k) != whole
    assert (forgot > 0) == bool(EXPECTED[kind, curve])


@pytest.mark.parametrize("name", ["factor", "best", "waited", "quiet", "drop_waited", "values"])
def test_every_part_of_the_state_matters(name):
    fresh, differing = multiplier("adaptive", defaults=True).state_dict(), 0
    assert name in fresh
    for curve, values in CURVES.items():
        whole = near(EXPECTED["adaptive", curve])
        for k in range(0, len(values), 3):
            first, second = multiplier("adaptive", defaults=True), multiplier("adaptive", defaults=True)
            told = decisions(first, values[:k])
            second.load_state_dict({**first.state_dict(), name: fresh[name]})
            differing += told + decisions(second, values[k:], start=k) != whole
    assert differing > 0


@pytest.mark.parametrize("curve", [name for name in CURVES if name != "broken"])  # -inf is torch's best ever, not ours
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_is_that_of_torch_with_one_less_patience(curve, mode):
    def of_torch(patience: int) -> list[Any]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode=mode, factor=0.5, patience=patience, threshold=0.1, threshold_mode="abs"
        )
        rates = [1.0]
        for value in CURVES[curve]:
            scheduler.step(value)
            rates.append(optimizer.param_groups[0]["lr"])
        return [(i, rates[i + 1]) for i in range(len(rates) - 1) if rates[i + 1] != rates[i]][:20]

    ours = decisions(multiplier("plateau", monitor_mode=mode), CURVES[curve])[:20]  # torch gives up at a rate of 1e-8
    assert ours == of_torch(4)
    assert ours != of_torch(5) or not ours


def test_without_a_cooldown_a_loss_that_gets_worse_is_cut_again_and_again():
    made = multiplier("plateau", lr_adapt_patience=1, lr_adapt_threshold=0.0)
    assert decisions(made, [1, 1.1, 1.2, 1.3, 1.4]) == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert multiplier("adaptive").cooldown == 3 and multiplier("adaptive", lr_adapt_cooldown=0).cooldown == 0


def test_flags_choose_the_multiplier():
    assert make_multiplier(Config()) is None
    assert type(multiplier("plateau")) is Plateau and type(multiplier("adaptive")) is Adaptive
    plain = multiplier("plateau", defaults=True)
    assert (plain.lr_adapt_patience, plain.lr_adapt_factor, plain.min_lr) == (50, 0.7, 1e-6)
    assert plain.factor == multiplier("adaptive").factor == 1.0


def test_a_change_says_its_reason_with_the_numbers():
    made = multiplier("plateau")
    changes = [made.observe(1.23456789, 1.0) for _ in range(6)]
    assert changes == [None] * 5 + [Change(1.0, 0.5, "no improvement in 5 observations, best 1.23457")]
    made = multiplier("plateau", min_lr=0.75)
    assert [made.observe(math.nan, 1.0) for _ in range(5)][-1] == Change(
        1.0, 0.75, "no improvement in 5 observations, no finite value so far, held by min_lr 0.75"
    )
    made = multiplier("adaptive", lr_adapt_window=4)
    assert [made.observe(value, 1.0) for value in (2.0, 2.0, 1.95, 2.05)][-1] == Change(
        1.0, 2.0, "stagnation: the last 4 observations do not fall, their variance 0.00125 is under 0.1, best 2"
    )
    made = multiplier("adaptive", lr_adapt_window=4, monitor_mode="max")
    assert "do not rise" in [made.observe(2.0, 1.0) for _ in range(4)][-1].reason


# The plain rule


def test_never_a_cut_before_the_patience_is_over():
    rising = [float(i) for i in range(12)]
    assert decisions(multiplier("plateau"), rising) == [(5, 0.5), (10, 0.25)]
    assert decisions(multiplier("plateau", lr_adapt_patience=6), rising) == [(6, 0.5)]


def test_an_improvement_is_more_than_the_threshold_from_the_best():
    assert decisions(multiplier("plateau", lr_adapt_threshold=0.25), [1.0, 0.75, *[0.75] * 8]) == [(5, 0.5)]
    assert decisions(multiplier("plateau", lr_adapt_threshold=0.24), [1.0, 0.75, *[0.75] * 8]) == [(6, 0.5)]
    steady = [4.0 - 0.0625 * i for i in range(60)]  # 0.1 in two observations: small improvements add up
    assert decisions(multiplier("plateau"), steady) == []
    assert decisions(multiplier("plateau", lr_adapt_threshold=0.5), steady) != []


def test_the_best_is_remembered_over_a_cut():
    made = multiplier("plateau")
    assert decisions(made, [1.0, *[3.0] * 5, *[2.0] * 5]) == [(5, 0.5), (10, 0.25)]  # 2 is better than 3, not than 1
    assert made.best == 1.0


def test_nothing_changes_in_the_cooldown_after_a_change_and_what_was_due_comes_next():
    flat = [1.0] * 20
    assert decisions(multiplier("plateau", lr_adapt_cooldown=7), flat) == [(5, 0.5), (13, 0.25)]
    assert decisions(multiplier("plateau", lr_adapt_cooldown=4), flat) == [(5, 0.5), (10, 0.25), (15, 0.125)]
    better_in_time = [*[1.0] * 12, 0.5, *[0.5] * 4, 0.5]
    assert decisions(multiplier("plateau", lr_adapt_cooldown=7), better_in_time) == [(5, 0.5), (17, 0.25)]


@pytest.mark.parametrize("kind", ["plateau", "adaptive"])
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_changes_are_more_than_a_window_apart_whatever_happens(kind, patience):
    flags = {"lr_adapt_patience": patience, "lr_adapt_drop_patience": patience + 1, "lr_adapt_window": 4}
    flags |= {"lr_adapt_cooldown": 4} if kind == "plateau" else {}
    apart = []
    for values in CURVES.values():
        at = [i for i, _ in decisions(multiplier(kind, **flags), values)]
        apart += [later - earlier for earlier, later in zip(at, at[1:], strict=False)]
    assert min(apart) == 5


# The bounds


def test_a_cut_stops_at_min_lr_and_is_not_reported_again():
    assert decisions(multiplier("plateau", min_lr=3e-4), [1.0] * 40) == [(5, 0.5), (10, pytest.approx(0.3))]
    assert decisions(multiplier("plateau", min_lr=2e-4), [1.0] * 40)[2:] == [(15, pytest.approx(0.2))]


@pytest.mark.parametrize("scheduled_lr", [1e-4, 9e-5, 0.0])
def test_a_cut_raises_nothing_where_the_schedule_is_under_min_lr_already(scheduled_lr):
    made = multiplier("plateau", min_lr=1e-4)
    assert decisions(made, [1.0] * 40, scheduled_lr) == [] and made.factor == 1.0
    assert decisions(multiplier("plateau", min_lr=1e-4), [1.0] * 6, 1.1e-4) == [(5, pytest.approx(1 / 1.1))]


def test_a_cut_that_min_lr_forbids_starts_the_count_again():
    made = multiplier("plateau", min_lr=1e-3)
    assert decisions(made, [1.0] * 6, 1e-3) == []
    assert decisions(made, [1.0] * 10, 1.0) == [(4, 0.5), (9, 0.25)]


def test_no_cut_ends_under_min_lr_by_rounding():
    generator = random.Random(3)
    held, rounded = 0, 0
    for _ in range(2000):
        made = multiplier("plateau", min_lr=generator.uniform(1e-7, 1e-4))
        for _ in range(30):
            rate = generator.uniform(5e-5, 5e-4)
            before = made.factor
            if change := made.observe(1.0, rate):
                assert change.after < before and rate * change.after >= made.min_lr
                held += "held by min_lr" in change.reason
                rounded += rate * (made.min_lr / rate) < made.min_lr
    assert held > 100 and rounded > 10


def test_min_lr_holds_a_drop_too_and_then_a_plain_cut():
    made = multiplier("adaptive", min_lr=7e-4)
    assert decisions(made, ROUGH) == [(4, 0.75), (8, pytest.approx(0.7))]
    assert decisions(multiplier("adaptive"), ROUGH)[1] == (8, 0.75**2)


def test_a_boost_stops_at_the_cap_and_is_not_reported_again():
    flags = {"lr_adapt_drop": 1.0, "lr_adapt_factor": 1.0}  # neither cuts
    assert decisions(multiplier("adaptive", **flags), [1.0] * 60) == [(2, 2.0), (6, 4.0)]
    assert decisions(multiplier("adaptive", max_lr_factor=3.0, **flags), [1.0] * 60) == [(2, 2.0), (6, 3.0)]
    assert decisions(multiplier("adaptive", max_lr_factor=1.0, **flags), [1.0] * 60) == []


def test_a_factor_over_a_cap_that_was_lowered_is_not_raised_and_not_cut():
    made = multiplier("adaptive", max_lr_factor=2.0, lr_adapt_drop=1.0, lr_adapt_factor=1.0)
    made.load_state_dict({**made.state_dict(), "factor": 3.0})
    assert decisions(made, [1.0] * 10) == [] and made.factor == 3.0


# The three rules of adaptive, by precedence: boost, drop, plain cut


def test_stagnation_comes_first():
    flags = {"lr_adapt_window": 6, "lr_adapt_drop_patience": 5, "lr_adapt_patience": 5}
    assert decisions(multiplier("adaptive", **flags), [1.0] * 6) == [(5, 2.0)]
    assert decisions(multiplier("adaptive", max_lr_factor=1.0, **flags), [1.0] * 6) == [(5, 0.75)]
    assert decisions(multiplier("adaptive", max_lr_factor=1.0, lr_adapt_drop=1.0, **flags), [1.0] * 6) == [(5, 0.5)]


def test_the_drop_comes_before_the_plain_cut_which_waits_for_its_turn():
    flags = {"lr_adapt_drop_patience": 5, "lr_adapt_patience": 5}
    assert decisions(multiplier("adaptive", **flags), ROUGH[:10]) == [(5, 0.75), (9, 0.375)]
    assert decisions(multiplier("adaptive", **flags, lr_adapt_drop=1.0), ROUGH[:10]) == [(5, 0.5)]
    flags["lr_adapt_drop_patience"] = 6
    assert decisions(multiplier("adaptive", **flags), ROUGH[:10]) == [(5, 0.5), (9, 0.375)]


@pytest.mark.parametrize(("drop_patience", "patience"), [(5, 9), (9, 4), (5, 5)])
def test_neither_cut_keeps_the_other_from_its_turn(drop_patience, patience):
    flags = {"lr_adapt_drop_patience": drop_patience, "lr_adapt_patience": patience}
    made = multiplier("adaptive", **flags)
    ratios = [change.after / change.before for value in ROUGH if (change := made.observe(value, 1.0))]
    assert {0.75, 0.5} == set(ratios) and min(ratios.count(0.75), ratios.count(0.5)) >= 4


def test_a_drop_that_is_always_due_leaves_no_turn_to_the_plain_cut():
    flags = {"lr_adapt_drop_patience": 4, "lr_adapt_patience": 4, "lr_adapt_window": 3}
    assert decisions(multiplier("adaptive", **flags), ROUGH[:13]) == [(4, 0.75), (8, 0.75**2), (12, 0.75**3)]
    flags["lr_adapt_drop_patience"] = 5
    assert decisions(multiplier("adaptive", **flags), ROUGH[:13]) == [(4, 0.5), (8, 0.375), (12, 0.1875)]


def test_a_boost_starts_both_counts_again():
    flags = {"lr_adapt_drop_patience": 7, "lr_adapt_patience": 8, "lr_adapt_window": 5, "max_lr_factor": 2.0}
    then_rough = [*[1.0] * 5, *ROUGH[1:]]
    assert decisions(multiplier("adaptive", **flags), then_rough)[:3] == [(4, 2.0), (11, 1.5), (17, 0.75)]
    flags["max_lr_factor"] = 1.0  # no boost at 4
    assert decisions(multiplier("adaptive", **flags), then_rough)[:2] == [(7, 0.75), (13, 0.375)]


def test_an_observation_that_improves_changes_nothing():
    values = [1.0, 1.0, 0.75]
    assert decisions(multiplier("adaptive"), [*values, 1.0]) == [(3, 2.0)]
    assert decisions(multiplier("adaptive", lr_adapt_threshold=0.3), values) == [(2, 2.0)]


def test_stagnation_is_a_small_variance_without_a_fall():
    wave = [0.2, -0.2, 0.1, -0.1, 0.0, 0.2, -0.1, -0.1]  # variance 0.02; its line rises by less than the noise
    flags = {"lr_adapt_window": 8, "lr_adapt_threshold": 0.05, "lr_adapt_drop_patience": 99, "lr_adapt_patience": 99}

    def boosted(slope: float, height: float = 1.0, **more: Any) -> bool:
        made = multiplier("adaptive", **{**flags, **more})
        return decisions(made, [0.0, *(1.0 + slope * i + height * y for i, y in enumerate(wave))]) == [(8, 2.0)]

    assert boosted(0.0) and boosted(0.02) and boosted(-0.02)
    assert not boosted(0.0, height=2.0)  # variance 0.08
    assert not boosted(-0.05, height=0.5)  # falling
    assert boosted(0.05, height=0.5)  # rising, with a small variance
    assert not boosted(0.2)  # rising, with a large one
    assert boosted(0.0, height=0.0) and not boosted(0.0, height=0.0, lr_adapt_threshold=0.0)  # no variance is under 0


def test_in_mode_max_a_rise_is_no_stagnation():
    flags = {
        "lr_adapt_window": 5, "lr_adapt_threshold": 0.05, "lr_adapt_drop_patience": 99, "monitor_mode": "max",
    }  # fmt: skip
    rising, falling = [0.01 * i for i in range(5)], [-0.01 * i for i in range(5)]
    assert decisions(multiplier("adaptive", **flags), rising) == []
    assert decisions(multiplier("adaptive", **flags), falling) == [(4, 2.0)]


def test_variance_and_fall():
    assert variance_and_fall([1.0, 2.0, 3.0, 4.0]) == (1.25, False)
    assert variance_and_fall([4.0, 3.0, 2.0, 1.0]) == (1.25, True)
    assert variance_and_fall([0.1] * 20) == (pytest.approx(0.0, abs=1e-30), False)
    # n = 4, slope -0.4, S = 2, E = 0.8: 0.8 x 2 is not more than 4 x 1.2
    assert variance_and_fall([1.0, 2.0, 0.0, 1.0]) == (0.5, False)
    # slope -1.2, S = 8, E = 7.2: 7.2 x 2 is more than 4 x 0.8
    assert variance_and_fall([4.0, 2.0, 2.0, 0.0]) == (2.0, True)
    # slope -1.6, S = 20, E = 12.8: 12.8 x 2 is less than 4 x 7.2
    assert variance_and_fall([6.0, 2.0, 4.0, 0.0]) == (5.0, False)


def test_a_fall_is_found_by_numpy_and_us_alike():
    numpy = pytest.importorskip("numpy")
    found = 0
    for seed in range(200):
        generator = random.Random(seed)
        values = [generator.gauss(0.0, 1.0) - 0.1 * i for i in range(12)]
        (slope, _), covariance = numpy.polyfit(range(12), values, 1, cov=True)
        variance, falls = variance_and_fall(values)
        assert variance == pytest.approx(numpy.var(values), rel=1e-12)
        assert falls == (slope < -2 * math.sqrt(covariance[0, 0]))
        found += falls
    assert 20 < found < 180


# Values that are not finite, and others that floats can hold


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_no_improvement(odd, mode):
    made = multiplier("plateau", monitor_mode=mode)
    assert decisions(made, [1.0, *[odd] * 5, 1.0]) == [(5, 0.5)]
    assert made.best == 1.0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_empties_the_window(odd):
    flags = {"lr_adapt_drop_patience": 99, "lr_adapt_patience": 99, "lr_adapt_window": 4, "max_lr_factor": 2.0}
    assert decisions(multiplier("adaptive", **flags), [1.0, 1.0, 1.0, odd, 1.0, 1.0, 1.0, 1.0]) == [(7, 2.0)]
    assert decisions(multiplier("adaptive", **flags), [1.0] * 8) == [(3, 2.0)]


@pytest.mark.parametrize("kind", ["plateau", "adaptive"])
@pytest.mark.parametrize("huge", [1e308, 1e200, 5e-324])
def test_no_finite_value_is_too_large_or_too_small(kind, huge):
    made = multiplier(kind)
    decisions(made, [huge, -huge, *[huge, -huge, huge, 0.0] * 10, *[huge] * 10])
    assert math.isfinite(made.factor) and json.dumps(made.state_dict(), allow_nan=False)


# Foreign states


def test_a_foreign_state_is_refused():
    plain, adaptive = multiplier("plateau"), multiplier("adaptive")
    before = adaptive.state_dict()
    with pytest.raises(ValueError, match=r"Adaptive .* in \['drop_waited', 'values'\]"):
        adaptive.load_state_dict(plain.state_dict())
    assert adaptive.state_dict() == before
    with pytest.raises(ValueError, match=r"Plateau .* in \['drop_waited', 'values'\]"):
        plain.load_state_dict(before)
    plain.load_state_dict(multiplier("plateau").state_dict())


def test_a_window_that_was_made_shorter_uses_the_newest_values():
    long, short = multiplier("adaptive", lr_adapt_window=7), multiplier("adaptive")
    assert decisions(long, [9.0, 9.0, 9.0, 9.0, 1.0, 1.0]) == []
    short.load_state_dict(long.state_dict())
    assert decisions(short, [1.0]) == [(0, 2.0)]
    assert decisions(long, [1.0]) == []  # seven values with a large variance
