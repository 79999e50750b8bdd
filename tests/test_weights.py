"""Weights of loss terms: every formula by literal values, and every way to write one wrongly."""

import math

import pytest

from training.config import make_config
from training.config.flags import ConfigError
from training.config.loss_weights import KINDS, LossWeight, parse_loss_weights


def values(text: str, epochs: int = 100, at=(0, 0.5, 1, 2, 3, 5, 10, 50)) -> list[float]:
    """The weight of the term z after so many mini-epochs of a stage of `epochs`."""
    weight = parse_loss_weights(f"z={text}")["z"]
    return [weight.at(epoch, epochs) for epoch in at]


def test_a_number_is_a_constant():
    assert values("0.25") == values("constant(0.25)") == values("constant(value=2.5e-1)") == [0.25] * 8
    assert values("0") == [0.0] * 8


def test_linear_is_constant_before_its_start_and_after_its_end():
    assert values("linear(1, 5, 1, 3)") == [1.0, 1.0, 1.0, 3.0, 5.0, 5.0, 5.0, 5.0]
    assert values("linear(0.5, 0, start_epoch=0, end_epoch=2)") == [0.5, 0.375, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert values("linear(end_epoch=3, start_epoch=1, end=5, start=1)") == values("linear(1, 5, 1, 3)")


def test_exponential_goes_from_start_towards_end():
    expected = [0.2 + 0.8 * math.exp(-0.5 * epoch) for epoch in (0, 0.5, 1, 2, 3, 5, 10, 50)]
    assert values("exponential(1, 0.2, 0.5)") == pytest.approx(expected, rel=1e-15)
    assert values("exponential(1, 0.2, decay_rate=0.5)")[:3] == pytest.approx([1.0, 0.82304063, 0.68522453], abs=1e-8)
    assert values("exponential(3, 0, 0)") == [3.0] * 8


def test_cosine_swings_from_min_to_max_in_half_a_period_and_back():
    assert values("cosine(0.1, 0.5, 4)", at=(0, 1, 2, 3, 4, 6)) == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1, 0.5])
    expected = [0.1 + (0.5 - 0.1) * (1 - math.cos(2 * math.pi * epoch / 7)) / 2 for epoch in (0, 1, 2, 3, 5)]
    assert values("cosine(min=0.1, max=0.5, period=7)", at=(0, 1, 2, 3, 5)) == pytest.approx(expected, rel=1e-15)


def test_warmup_epochs_rise_from_nothing_to_what_the_formula_says():
    assert values("constant(2, warmup_epochs=4)", at=(0, 1, 2, 3, 4, 5)) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert values("linear(2, 4, 0, 2, warmup_epochs=2)", at=(0, 1, 2, 3)) == [0.0, 1.5, 4.0, 4.0]
    assert values("cosine(1, 1, 3, warmup_epochs=0)") == [1.0] * 8


def test_the_final_weight_holds_in_the_last_mini_epoch():
    at = (0, 8, 8.99, 9, 9.99)
    assert values("constant(2, final=7)", epochs=10, at=at) == [2.0, 2.0, 2.0, 7.0, 7.0]
    assert values("linear(0, 1, 0, 2, warmup_epochs=20, final=0)", epochs=10, at=at)[3:] == [0.0, 0.0]
    assert values("constant(2, final=7)", epochs=1, at=(0, 0.5)) == [7.0, 7.0], "of one mini-epoch it is the last"


def test_several_terms():
    weights = parse_loss_weights("ce=2, z=linear(0, 1e-4, start_epoch=2, end_epoch=5, warmup_epochs=1), aux=0.5")
    assert weights == {
        "ce": LossWeight("constant", {"value": 2.0}),
        "z": LossWeight("linear", {"start": 0.0, "end": 1e-4, "start_epoch": 2.0, "end_epoch": 5.0}, warmup_epochs=1.0),
        "aux": LossWeight("constant", {"value": 0.5}),
    }
    assert parse_loss_weights("") == parse_loss_weights("  ") == {}


@pytest.mark.parametrize("text", ["ce=-1", "z=linear(0, -1, 0, 1)", "z=cosine(-1, 1, 2)", "z=constant(1, final=-2)"])
def test_a_weight_that_trains_away_from_the_data_is_refused(text):
    with pytest.raises(ValueError, match="is negative, which would train away from the data"):
        parse_loss_weights(text)


@pytest.mark.parametrize("text", ["ce=0", "ce=0, z=0.0"])
def test_weights_that_learn_nothing_are_refused(text):
    with pytest.raises(ValueError, match="nothing would be learnt"):
        parse_loss_weights(text)
    assert (
        parse_loss_weights("z=0") and parse_loss_weights("ce=0, kd=1") and parse_loss_weights("ce=linear(0, 1, 0, 1)")
    )


def test_in_yaml_they_stand_as_a_mapping_too():
    weights = {"ce": 1, "z": "cosine(0, 1e-4, 3)", "aux": 0.01}
    config = make_config({"data_path": "x", "loss_weights": weights})
    assert config.loss_weights == "ce=1, z=cosine(0, 1e-4, 3), aux=0.01"
    assert make_config({"data_path": "x", "loss_weights": "z=1e-4"}).loss_weights == "z=1e-4"
    with pytest.raises(ConfigError, match="--loss_weights z=high: z: value is not a finite number"):
        make_config({"data_path": "x", "loss_weights": {"z": "high"}})


SHAPE = "write term=number or term=kind(...), separated by commas"
WRONG = {
    "1": SHAPE,
    "z": SHAPE,
    "z=": SHAPE,
    "z:1": SHAPE,
    "z=1 ce=2": SHAPE,
    "z=1; ce=2": SHAPE,
    ",": SHAPE,
    "*a": SHAPE,
    "lambda=1": SHAPE,
    "z=1)(ce=2": SHAPE,  # what would be another expression
    "z=1)+(2": SHAPE,
    "z=1 # ce=2": SHAPE,
    "z=\0": SHAPE,
    "z=" + "9" * 5000: SHAPE,
    "z=" + "(" * 300 + "1" + ")" * 300: SHAPE,
    "z=1, z=2": "z is given twice or is no term",
    "**{}": "** is given twice or is no term",
    "z=True": "z: value is not a finite number",
    "z='1'": "z: value is not a finite number",
    "z=1j": "z: value is not a finite number",
    "z=nan": "z: value is not a finite number",
    "z=1e999": "z: value is not a finite number",
    "z=" + "9" * 400: "z: value is not a finite number",
    "z=[1]": "z: value is not a finite number",
    "z={[]: 1}": "z: value is not a finite number",
    "z=1+1": "z: value is not a finite number",
    "z=constant(high)": "z: value is not a finite number",
    "z=constant(*[1])": "z: value is not a finite number",
    "z=linear(0, 1, 2, x)": "z: end_epoch is not a finite number",
    "z=sine(1)": "z: sine is none of constant, linear, exponential, cosine",
    "z=a.b(1)": "z: this is none of constant, linear, exponential, cosine",
    "z=constant(1)(2)": "z: this is none of constant, linear, exponential, cosine",
    "z=constant(1, 2)": "z: constant takes value",
    "z=linear(0, 1, 2, 3, 4)": "z: linear takes start, end, start_epoch, end_epoch",
    "z=cosine(0, 1, 2, 3)": "z: cosine takes min, max, period",
    "z=constant()": "z: constant lacks value",
    "z=linear(0, 1, end_epoch=2)": "z: linear lacks start_epoch",
    "z=exponential(0)": "z: exponential lacks end, decay_rate",
    "z=constant(1, value=2)": "z: value is given twice or is none of value, warmup_epochs, final",
    "z=constant(1, final=2, final=3)": "z: final is given twice or is none of value, warmup_epochs, final",
    "z=constant(1, last=2)": "z: last is given twice or is none of value, warmup_epochs, final",
    "z=constant(**{'value': 1})": "z: None is given twice or is none of value, warmup_epochs, final",
    "z=linear(0, 1, 2, 2)": "z: end_epoch must come after start_epoch",
    "z=linear(0, 1, 3, 2)": "z: end_epoch must come after start_epoch",
    "z=cosine(0, 1, 0)": "z: period must be greater than 0",
    "z=cosine(0, 1, -2)": "z: period must be greater than 0",
    "z=exponential(1, 0, -0.1)": "z: decay_rate must be at least 0",
    "z=constant(1, warmup_epochs=-1)": "z: warmup_epochs must be at least 0",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40].replace("\0", "NUL"))
def test_what_is_wrong_is_said_of_which_term(text):
    with pytest.raises(ValueError) as caught:
        parse_loss_weights(text)
    assert str(caught.value) == f"--loss_weights {text}: {WRONG[text]}"


def test_the_configuration_reports_it_among_the_other_problems():
    with pytest.raises(ConfigError) as caught:
        make_config({"data_path": "x", "loss_weights": "z=cosine(0, 1, 0)", "amsgrad": "1", "optimizer": "sgd"})
    assert caught.value.problems == [
        "--amsgrad belongs to --optimizer adam or adamw",
        "--loss_weights z=cosine(0, 1, 0): z: period must be greater than 0",
    ]


def test_every_kind_is_tried_here():
    assert set(KINDS) == {"constant", "linear", "exponential", "cosine"}
