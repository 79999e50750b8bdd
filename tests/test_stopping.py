"""Early stopping: which observation stops the run, and that an interruption changes nothing."""

import json
import math

import pytest

from training.schedule.stopping import EarlyStopping


def stops(values: list[float], patience: int = 3, min_delta: float = 0.1, mode: str = "min") -> list[bool]:
    stopping = EarlyStopping(patience, min_delta, mode)
    return [stopping.observe(value) for value in values]


def test_the_run_stops_at_the_observation_that_completes_the_patience():
    stopping = EarlyStopping(10, 0.001, "min")
    assert [stopping.observe(1.0) for _ in range(12)] == [False] * 10 + [True, True]
    assert (stopping.best, stopping.waited) == (1.0, 11)


def test_an_improvement_starts_the_count_again():
    assert stops([3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0]) == [False] * 6 + [True, False]


def test_only_a_change_of_more_than_min_delta_is_an_improvement():
    assert stops([1.0, 0.75, 0.75, 0.75], min_delta=0.25) == [False, False, False, True]
    assert stops([1.0, 0.75, 0.75, 0.75], min_delta=0.24) == [False, False, False, False]
    assert stops([1.0, 1.25, 1.25, 1.25], min_delta=0.25, mode="max") == [False, False, False, True]
    assert stops([1.0, 1.25, 1.25, 1.25], min_delta=0.24, mode="max") == [False, False, False, False]


def test_small_improvements_add_up_because_best_stays_where_the_last_one_was():
    stopping = EarlyStopping(3, 0.25, "min")
    assert not any(stopping.observe(4.0 - 0.125 * i) for i in range(30))
    assert stopping.best == 4.0 - 0.125 * 27


def test_in_mode_max_large_values_are_good():
    accuracies = [0.1, 0.3, 0.5, 0.5, 0.4, 0.55]
    assert stops(accuracies, mode="max") == [False] * 5 + [True]
    assert stops(accuracies, mode="min") == [False, False, False, True, True, True]
    assert stops([-value for value in accuracies], mode="min") == stops(accuracies, mode="max")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_no_improvement(odd, mode):
    stopping = EarlyStopping(2, 0.1, mode)
    assert [stopping.observe(value) for value in (odd, 1.0, odd, odd)] == [False, False, False, True]
    assert stopping.best == 1.0
    never_finite = EarlyStopping(2, 0.1, mode)
    assert [never_finite.observe(odd), never_finite.observe(odd)] == [False, True]
    assert never_finite.state_dict() == {"best": None, "waited": 2}


def test_an_interruption_changes_nothing():
    values = [3.0, 2.0, 2.5, math.nan, 1.5, 1.6, 1.7, 1.8, 1.0]
    whole = stops(values)
    assert whole == [False] * 7 + [True, False]
    differing = 0
    for k in range(len(values)):
        first = EarlyStopping(3, 0.1, "min")
        told = [first.observe(value) for value in values[:k]]
        second, forgetful = EarlyStopping(3, 0.1, "min"), EarlyStopping(3, 0.1, "min")
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert told + [second.observe(value) for value in values[k:]] == whole
        differing += told + [forgetful.observe(value) for value in values[k:]] != whole
    assert differing == 3  # cut after the best of 1.5 and before the stop: a fresh count is late


def test_a_foreign_state_is_refused():
    stopping = EarlyStopping(3, 0.1, "min")
    with pytest.raises(ValueError, match=r"EarlyStopping .*\['factor', 'waited'\]"):
        stopping.load_state_dict({"best": 1.0, "factor": 1.0})
    assert stopping.state_dict() == {"best": None, "waited": 0}
