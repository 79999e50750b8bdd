"""The numbers of a run that are fixed before its first step, and what decides them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from training.config import Config
from training.config.loss_weights import NOTHING, LossWeight, parse_loss_weights
from training.config.stages import Stage, stages_as_text
from training.schedule.learning_rate import LRSchedule, lr_factor, warmup_steps_of
from training.schedule.train_state import LoopState


@dataclass(frozen=True)
class Span:
    """A stage in its place: steps and epochs of the whole run, all counted before any change of the rows of a step."""

    stage: Stage
    window_rows: int  # rows of a step
    first_epoch: int
    steps_before: int
    epoch_ends: list[int]  # steps of this stage after which its epochs end
    length: int  # steps of the stage; more or less than the last of these ends where --max_steps says so
    schedule: LRSchedule
    weights: dict[str, LossWeight]

    def lr(self, step: int) -> float:
        epoch = bisect_left(self.epoch_ends, step)
        if self.schedule.kind == "mini_epoch" and self.stage.repeats > 1:  # each repeat begins anew
            epoch %= self.stage.mini_epochs
        factor = lr_factor(self.schedule, step, self.length, epoch)
        return self.stage.config.learning_rate * factor

    def loss_weights(self, step: int) -> dict[str, float]:
        epoch = bisect_left(self.epoch_ends, step)
        start, end = ([0, *self.epoch_ends][epoch], [*self.epoch_ends, self.length][epoch])
        done = epoch + (step - 1 - start) / max(1, end - start)
        return {term: weight.at(done, len(self.epoch_ends)) for term, weight in self.weights.items()}


@dataclass(frozen=True)
class Plan:
    """Counted in rows and steps over all ranks; how ranks and micro-batches share a step changes nothing here."""

    spans: list[Span]
    rows_of: Callable[[int], int]  # rows of each epoch
    total_steps: int
    epochs: int  # that the run begins
    extra_steps: int  # steps done beyond what the position in the data takes at this window size, see make_plan
    lr_shift: int  # as many of them as the learning rate does not count
    log_interval: str
    eval_interval: str
    save_interval: str
    save_evaluated: bool  # also what has just been evaluated

    def stage_of(self, epoch: int) -> int:
        """The number of the stage, from 0, to which an epoch belongs."""
        return _stage_of(self.spans, epoch)

    def mini_epoch_of(self, epoch: int) -> int:
        """The number of an epoch, from 0, within its repeat of its stage."""
        span = self.span_of(epoch)
        own = epoch - span.first_epoch
        return own % span.stage.mini_epochs if span.stage.repeats > 1 else own

    def span_of(self, epoch: int) -> Span:
        return self.spans[self.stage_of(epoch)]

    def window_rows(self, epoch: int) -> int:
        """Rows of a step of this epoch."""
        return self.span_of(epoch).window_rows

    def lr(self, step: int) -> float:
        span, own = self._at(step)
        return span.lr(own)

    def loss_weights(self, step: int) -> dict[str, float]:
        """The weight of each loss term that has one; the others count once."""
        span, own = self._at(step)
        return span.loss_weights(own)

    def _at(self, step: int) -> tuple[Span, int]:
        """The stage of a step and the number of the step within it."""
        planned = step - self.lr_shift
        number = max(0, bisect_left([span.steps_before for span in self.spans], planned) - 1)
        return self.spans[number], planned - self.spans[number].steps_before

    def steps_of(self, epoch: int, rows_done: int = 0) -> int:
        """Steps that an epoch takes from the row `rows_done` on."""
        return _steps(self.rows_of(epoch) - rows_done, self.window_rows(epoch))

    def ends_epoch(self, state: LoopState) -> bool:
        return state.rows == self.rows_of(state.epoch)

    def due(self, state: LoopState, interval: str) -> bool:
        """Whether what happens every `N` steps or `Nepoch`, and at the end of the run, happens now."""
        if state.step == self.total_steps:
            return True
        if interval.endswith("epoch"):  # after a step, the start of an epoch is the end of the one before
            done = state.epoch + self.ends_epoch(state)
            return (self.ends_epoch(state) or state.rows == 0) and done % int(interval.removesuffix("epoch")) == 0
        return state.step % int(interval) == 0

    def saves(self, state: LoopState) -> bool:
        """Whether a checkpoint is due after this step."""
        evaluated = self.save_evaluated and self.due(state, self.eval_interval)
        return evaluated or self.due(state, self.save_interval)

    def epochs_done(self, state: LoopState) -> float:
        return state.epoch + state.rows / self.rows_of(state.epoch)


def make_plan(
    stages: Sequence[Stage], rows_of: Callable[[int], int], window_rows: Sequence[int], state: LoopState,
    term_weights: Mapping[str, float] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run at the position in `state`; `window_rows` holds the rows of a step for each stage.

    `term_weights`: of terms that a stage does not name.

    Step and position agree unless the rows of a step have changed on the way, which only a run of one stage may do.
    Then `extra_steps` is the difference: a run counted in epochs has as many steps left as its rows need, and its
    learning rate goes on from the same share of them; a run counted in steps goes on counting.
    """
    config, spans = stages[0].config, _lay_out(stages, rows_of, window_rows, term_weights or {})
    extra_steps = state.step - _steps_at(spans, rows_of, state.epoch, state.rows)
    if len(spans) > 1 and extra_steps:
        raise ValueError(
            "a run of several stages keeps the rows of its steps and its data: it cannot go on with others"
        )
    lr_shift = 0 if config.max_steps else extra_steps
    total_steps = spans[-1].steps_before + spans[-1].length + lr_shift
    epochs, reached = 0, 0
    while reached < total_steps - extra_steps:
        reached += _steps(rows_of(epochs), spans[_stage_of(spans, epochs)].window_rows)
        epochs += 1
    return Plan(
        spans=spans, rows_of=rows_of, total_steps=total_steps, epochs=epochs, extra_steps=extra_steps,
        lr_shift=lr_shift, log_interval=config.log_interval, eval_interval=config.eval_interval,
        save_interval=config.save_interval, save_evaluated=config.keep_best > 0,
    )  # fmt: skip


def _lay_out(
    stages: Sequence[Stage], rows_of: Callable[[int], int], window_rows: Sequence[int],
    term_weights: Mapping[str, float],
) -> list[Span]:  # fmt: skip
    """The stages one after the other."""
    weights = [_loss_weights(stage) for stage in stages]
    # What one stage weighs and another does not name counts for nothing there, but for the cross entropy.
    unnamed = {term: NOTHING for each in weights for term in each if term != "ce"}
    unnamed |= {term: LossWeight("constant", {"value": weight}) for term, weight in term_weights.items()}
    spans, epoch, steps = list[Span](), 0, 0
    for stage, rows, own in zip(stages, window_rows, weights, strict=True):
        ends = list(accumulate(_steps(rows_of(epoch + n), rows) for n in range(stage.epochs)))
        length = stage.config.max_steps or ends[-1]
        while ends[-1] < length:
            ends.append(ends[-1] + _steps(rows_of(len(ends)), rows))
        spans.append(
            Span(stage, rows, epoch, steps, ends, length, _schedule(stage, length), {**unnamed, **own})
        )  # fmt: skip
        epoch, steps = epoch + stage.epochs, steps + length
    return spans


def _steps_at(spans: Sequence[Span], rows_of: Callable[[int], int], epoch: int, rows: int) -> int:
    """Steps that it takes to come as far as this in the data."""
    span = spans[_stage_of(spans, epoch)]
    whole = sum(_steps(rows_of(n), span.window_rows) for n in range(span.first_epoch, epoch + 1))
    return span.steps_before + whole - _steps(rows_of(epoch) - rows, span.window_rows)


def _stage_of(spans: Sequence[Span], epoch: int) -> int:
    return bisect_right([span.first_epoch for span in spans], epoch) - 1


def _schedule(stage: Stage, length: int) -> LRSchedule:
    config = stage.config
    return LRSchedule(
        kind=config.lr_schedule, warmup_steps=warmup_steps_of(config.warmup_steps, config.warmup_ratio, length),
        floor=config.min_lr_ratio, cycles=config.lr_cycles, decay_ratio=config.lr_decay_ratio, power=config.lr_power,
        interval=config.lr_interval, gamma=config.lr_gamma, peak_ratio=config.lr_peak_ratio,
        start_ratio=config.lr_start_ratio, warmup_epochs=config.lr_warmup_epochs,
        milestones=tuple(each.strip() for each in config.lr_milestones.split(",") if each.strip()),
    )  # fmt: skip


def _loss_weights(stage: Stage) -> dict[str, LossWeight]:
    penalty = {"gp": LossWeight("constant", {"value": stage.config.gradient_penalty})}
    return {**(penalty if stage.config.gradient_penalty else {}), **parse_loss_weights(stage.config.loss_weights)}


def micro_batches_per_step(window_rows: int, world_size: int, batch_size: int) -> int:
    """Micro-batches that each rank needs for a step of `window_rows` global rows."""
    return -(-window_rows // (world_size * batch_size))


def _steps(rows: int, window_rows: int) -> int:
    return -(-rows // window_rows)


def rows_per_step(stages: Sequence[Stage], world_size: int, kept: Sequence[int]) -> list[int]:
    """Rows of a step over all ranks for each stage: as the flag says, else as they were at the first start (`kept`)."""
    at_first = [stage.config.batch_size * stage.config.accumulation_steps * world_size for stage in stages]
    kept = kept if len(kept) == len(stages) else at_first
    return [stage.config.global_batch_size or rows for stage, rows in zip(stages, kept, strict=True)]


def describe_stages(plan: Plan, world_size: int) -> list[str]:
    """A line for each stage: its steps, its rows, its learning rate."""
    lines = []
    for span in plan.spans:
        config, last = span.stage.config, span.steps_before + span.length
        name = f"stage {span.stage.name}: " if len(plan.spans) > 1 else ""
        share = share_of_a_step(span.stage, span.window_rows, world_size)
        rate = f"learning rate {config.learning_rate:g} ({config.lr_schedule})"
        lines.append(f"{name}steps {span.steps_before + 1} to {last} of {share}, {rate}")
    return lines


def share_of_a_step(stage: Stage, window_rows: int, world_size: int) -> str:
    """How ranks and micro-batches share the rows of a step, and which flag gives way for it."""
    config = stage.config
    micro_batches = micro_batches_per_step(window_rows, world_size, config.batch_size)
    shares = f"{world_size} processes x {micro_batches} micro-batches x at most {config.batch_size}"
    gives_way = config.accumulation_steps not in (1, micro_batches)
    reason = f"; --accumulation_steps {config.accumulation_steps} gives way" if gives_way else ""
    return f"{window_rows} rows ({shares}{reason})"


def resolve(config: Config, stages: list[Stage], window_rows: list[int], world_size: int, **values: Any) -> Config:
    """The configuration that starts the same run again on the same machine, whatever the defaults become."""
    fixed = []
    for stage, rows in zip(stages, window_rows, strict=True):
        micro_batches = micro_batches_per_step(rows, world_size, stage.config.batch_size)
        told = replace(stage.config, global_batch_size=rows, accumulation_steps=micro_batches)
        fixed.append(replace(stage, config=told))
    if config.stages is None:
        return replace(fixed[0].config, **values)
    return replace(config, stages=stages_as_text(fixed, config), **values)
