"""Where a run is: what a checkpoint holds besides weights, optimizer and loss scale. Changed only between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from training.schedule.sums import Sums

MAX_NON_FINITE_IN_A_ROW, MAX_NON_FINITE = 3, 10


class NonFiniteError(ArithmeticError):
    """Too many steps with a NaN or infinite gradient."""

    exit_code = 70


@dataclass
class LoopState:
    step: int = 0  # updates done
    epoch: int = 0  # the epoch under way, from 0
    rows: int = 0  # rows of this epoch that are trained, over all ranks
    tokens: int = 0
    supervised_tokens: int = 0
    non_finite: int = 0  # steps left out because of a gradient that was not finite
    non_finite_in_a_row: int = 0
    overflows: int = 0  # steps that the fp16 loss scale left out
    unfinished: bool = False  # a stop came between the update of this step and the end of its validation
    evaluations: int = 0
    lr_factor: float = 1.0  # what the learning rate of the schedule is multiplied by
    policies: dict[str, Any] = field(default_factory=dict)  # what they remember, see training/schedule/policies.py
    since_log: Sums = field(default_factory=Sums)
    since_epoch: Sums = field(default_factory=Sums)
    since_observed: Sums = field(default_factory=Sums)  # by the policies

    @property
    def all_sums(self) -> tuple[Sums, ...]:
        return self.since_log, self.since_epoch, self.since_observed

    def advance(self, rows: int, num_rows: int, tokens: int, supervised: int) -> None:
        """One step is done; `num_rows` ends the epoch."""
        self.step += 1
        self.rows = min(self.rows + rows, num_rows)
        self.tokens += tokens
        self.supervised_tokens += supervised

    def next_epoch(self) -> None:
        self.epoch, self.rows, self.since_epoch = self.epoch + 1, 0, Sums()

    def count_non_finite(self) -> None:
        """Raises NonFiniteError when there are too many to go on."""
        self.non_finite += 1
        self.non_finite_in_a_row += 1
        if self.non_finite_in_a_row >= MAX_NON_FINITE_IN_A_ROW or self.non_finite >= MAX_NON_FINITE:
            raise NonFiniteError(
                f"step {self.step}: the gradient was not finite {self.non_finite_in_a_row} times in a row and "
                f"{self.non_finite} times in all. Checkpoints made so far are good; lower --learning_rate, or look at "
                "the samples named above"
            )

    def to_dict(self, sum_ints: Callable[[Sequence[int]], list[int]]) -> dict[str, Any]:
        """Plain values, sums taken over ranks; every rank must call it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.total(sum_ints) if isinstance(value, Sums) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], is_main: bool) -> LoopState:
        """Rank 0 goes on from the sums over all ranks, the others from none. ValueError for another version's state."""
        if values.keys() != (known := {f.name for f in fields(cls)}):
            raise ValueError(
                f"the checkpoint was written by another version, differing in {sorted(values.keys() ^ known)}"
            )
        totals = {f.name: values[f.name] for f in fields(cls) if f.type == "Sums"}
        sums = {name: Sums(total if is_main else dict.fromkeys(total, 0)) for name, total in totals.items()}
        return cls(**{**values, **sums})
