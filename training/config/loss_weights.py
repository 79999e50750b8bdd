"""Weights of loss terms: numbers, or pure functions of how many mini-epochs of its stage a run has done.

Written as `ce=1, z=linear(0, 1e-4, start_epoch=2, end_epoch=5, warmup_epochs=1)`; in YAML also as a mapping.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass


def _constant(_epoch: float, value: float) -> float:
    return value


def _linear(epoch: float, start: float, end: float, start_epoch: float, end_epoch: float) -> float:
    """From start at start_epoch to end at end_epoch, constant before and after."""
    share = min(max((epoch - start_epoch) / (end_epoch - start_epoch), 0.0), 1.0)
    return start + (end - start) * share


def _exponential(epoch: float, start: float, end: float, decay_rate: float) -> float:
    """end + (start - end) exp(-decay_rate epoch)."""
    return end + (start - end) * math.exp(-decay_rate * epoch)


def _cosine(epoch: float, min: float, max: float, period: float) -> float:
    """min + (max - min) (1 - cos(2 pi epoch / period)) / 2: from min at 0 to max after half a period, and back."""
    return min + (max - min) * (1.0 - math.cos(2.0 * math.pi * epoch / period)) / 2.0


KINDS: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {  # kind -> formula, names of its numbers in order
    "constant": (_constant, ("value",)),
    "linear": (_linear, ("start", "end", "start_epoch", "end_epoch")),
    "exponential": (_exponential, ("start", "end", "decay_rate")),
    "cosine": (_cosine, ("min", "max", "period")),
}
ANY_KIND = ("warmup_epochs", "final")


@dataclass(frozen=True)
class LossWeight:
    kind: str
    numbers: dict[str, float]
    warmup_epochs: float = 0.0  # over which the weight rises from 0 to what its formula says
    final: float | None = None  # what holds in the last mini-epoch of the stage, whatever the formula says

    def at(self, epoch: float, epochs: int) -> float:
        """The weight after `epoch` of the stage's `epochs` mini-epochs, fractions of one included."""
        if self.final is not None and epoch >= epochs - 1:
            return self.final
        value = KINDS[self.kind][0](epoch, **self.numbers)
        return value * epoch / self.warmup_epochs if epoch < self.warmup_epochs else value


NOTHING = LossWeight("constant", {"value": 0.0})


def parse_loss_weights(text: str) -> dict[str, LossWeight]:
    """Term -> weight. Raises ValueError that says what is wrong with which term."""
    wrong = f"--loss_weights {text}"
    try:
        call = ast.parse(f"weights({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise ValueError(f"{wrong}: write term=number or term=kind(...), separated by commas")
    weights: dict[str, LossWeight] = {}
    for item in call.keywords:
        if item.arg is None or item.arg in weights:
            raise ValueError(f"{wrong}: {item.arg or '**'} is given twice or is no term")
        weights[item.arg] = _weight(item.value, f"{wrong}: {item.arg}")
    if "ce" in weights and all(weight == NOTHING for weight in weights.values()):
        raise ValueError(f"{wrong}: nothing weighs anything, so nothing would be learnt")
    return weights


def _weight(node: ast.expr, wrong: str) -> LossWeight:
    if not isinstance(node, ast.Call):
        return _checked(LossWeight("constant", {"value": _number(node, wrong, "value")}), wrong)
    kind = node.func.id if isinstance(node.func, ast.Name) else ""
    if kind not in KINDS:
        raise ValueError(f"{wrong}: {kind or 'this'} is none of {', '.join(KINDS)}")
    names = KINDS[kind][1]
    if len(node.args) > len(names):
        raise ValueError(f"{wrong}: {kind} takes {', '.join(names)}")
    numbers = {name: _number(value, wrong, name) for name, value in zip(names, node.args, strict=False)}
    for item in node.keywords:
        if item.arg not in (*names, *ANY_KIND) or item.arg in numbers:
            raise ValueError(f"{wrong}: {item.arg} is given twice or is none of {', '.join((*names, *ANY_KIND))}")
        numbers[item.arg] = _number(item.value, wrong, item.arg)
    if missing := [name for name in names if name not in numbers]:
        raise ValueError(f"{wrong}: {kind} lacks {', '.join(missing)}")
    if kind == "linear" and numbers["end_epoch"] <= numbers["start_epoch"]:
        raise ValueError(f"{wrong}: end_epoch must come after start_epoch")
    if kind == "cosine" and numbers["period"] <= 0:
        raise ValueError(f"{wrong}: period must be greater than 0")
    for name in ("decay_rate", "warmup_epochs"):  # growth without a bound would overflow in the middle of a run
        if numbers.get(name, 0.0) < 0:
            raise ValueError(f"{wrong}: {name} must be at least 0")
    more = {name: numbers.pop(name) for name in ANY_KIND if name in numbers}
    return _checked(LossWeight(kind, numbers, **more), wrong)


def _checked(weight: LossWeight, wrong: str) -> LossWeight:
    negative = [name for name in ("value", "start", "end", "min", "max") if weight.numbers.get(name, 0.0) < 0]
    negative += ["final"] if (weight.final or 0.0) < 0 else []
    if negative:
        raise ValueError(f"{wrong}: {negative[0]} is negative, which would train away from the data")
    return weight


def _number(node: ast.expr, wrong: str, name: str) -> float:
    try:
        value = ast.literal_eval(node)
        number = float(value) if type(value) in (int, float) else math.nan
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{wrong}: {name} is not a finite number")
    return number
