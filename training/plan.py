"""The numbers of a run that are fixed before its first step, and what decides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.config import Config
from training.schedules import lr_factor, warmup_steps_of
from training.state import LoopState


@dataclass(frozen=True)
class Plan:
    """Counted in rows and steps over all ranks; how ranks and micro-batches share a step changes nothing here."""

    rows_of: Callable[[int], int]  # rows of each epoch
    window_rows: int  # rows of a step
    total_steps: int
    epochs: int  # that the run begins
    extra_steps: int  # steps done beyond what the position in the data takes at this window size, see make_plan
    log_interval: str
    eval_interval: str
    save_interval: str
    save_evaluated: bool  # also what has just been evaluated
    lr: Callable[[int], float]

    def steps_of(self, epoch: int, rows_done: int = 0) -> int:
        """Steps that an epoch takes from the row `rows_done` on."""
        return _steps(self.rows_of(epoch) - rows_done, self.window_rows)

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


def make_plan(config: Config, rows_of: Callable[[int], int], window_rows: int, state: LoopState) -> Plan:
    """The plan from the position in `state` on.

    Step and position agree unless the rows of a step have changed on the way. Then `extra_steps` is the difference: a
    run counted in epochs has as many steps left as its rows need, and its learning rate goes on from the same share of
    them; a run counted in steps goes on counting.
    """

    def steps_of_first(epochs: int) -> int:
        return sum(_steps(rows_of(epoch), window_rows) for epoch in range(epochs))

    left_in_epoch = _steps(rows_of(state.epoch) - state.rows, window_rows)
    extra_steps = state.step - (steps_of_first(state.epoch + 1) - left_in_epoch)
    length, lr_shift = config.max_steps, 0
    if length is None:
        length, lr_shift = steps_of_first(config.epochs), extra_steps
    total_steps, epochs, reached = length + lr_shift, 0, 0
    while reached < total_steps - extra_steps:
        reached += _steps(rows_of(epochs), window_rows)
        epochs += 1
    warmup = warmup_steps_of(config.warmup_steps, config.warmup_ratio, length)

    def lr(step: int) -> float:
        factor = lr_factor(
            step - lr_shift, length, schedule=config.lr_schedule, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio
        )
        return config.learning_rate * factor

    return Plan(
        rows_of=rows_of, window_rows=window_rows, total_steps=total_steps, epochs=epochs, extra_steps=extra_steps,
        log_interval=config.log_interval, eval_interval=config.eval_interval, save_interval=config.save_interval,
        save_evaluated=config.save_top_k > 0, lr=lr,
    )  # fmt: skip


def micro_batches_per_step(window_rows: int, world_size: int, batch_size: int) -> int:
    """Micro-batches that each rank needs for a step of `window_rows` global rows."""
    return -(-window_rows // (world_size * batch_size))


def _steps(rows: int, window_rows: int) -> int:
    return -(-rows // window_rows)


def share_of_a_step(config: Config, window_rows: int, world_size: int, micro_batches: int) -> str:
    """How ranks and micro-batches share the rows of a step, and which flag gives way for it."""
    shares = f"{world_size} processes x {micro_batches} micro-batches x at most {config.batch_size}"
    gives_way = config.accumulation_steps not in (1, micro_batches)
    reason = f"; --accumulation_steps {config.accumulation_steps} gives way" if gives_way else ""
    return f"{window_rows} rows ({shares}{reason})"


def identity_of(config: Config, dtype: str, window_rows: int, model: str) -> dict[str, Any]:
    """What decides the result of a run besides its data, under the names that --allow_change takes."""
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epochs"
    warmup = config.warmup_steps or config.warmup_ratio
    return {
        "model": f"{model}, dropout {config.dropout}, from {config.from_weight}",
        "seed": config.seed,
        "schedule": f"{config.lr_schedule} {config.learning_rate} x {config.min_lr_ratio}, warmup {warmup}, {length}",
        "optimizer": f"{config.optimizer} {config.adam_beta1} {config.adam_beta2} {config.adam_eps}, "
        f"decay {config.weight_decay}, clip {config.grad_clip}, smoothing {config.label_smoothing}",
        "precision": dtype,
        "global_batch_size": window_rows,
    }
