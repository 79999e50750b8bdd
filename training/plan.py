"""The numbers of a run that are fixed before its first step, and what decides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.config import Config, interval_steps
from training.schedules import lr_factor, warmup_steps_of
from training.state import LoopState


@dataclass(frozen=True)
class Plan:
    """Counted in rows and steps over all ranks; how ranks and micro-batches share a step changes nothing here."""

    num_rows: int  # rows of an epoch
    window_rows: int  # rows of a step
    steps_per_epoch: int
    epochs: int
    total_steps: int
    log_steps: int
    eval_steps: int
    save_steps: int
    shift: int  # steps done beyond what the position in the data needs at this window size
    lr: Callable[[int], float]

    def due(self, step: int, interval: int) -> bool:
        """Whether what happens every `interval` steps, and at the end of the run, happens after `step`."""
        return (step - self.shift) % interval == 0 or step == self.total_steps


def make_plan(config: Config, num_rows: int, window_rows: int, state: LoopState) -> Plan:
    """The plan from the position in `state` on.

    `shift` is 0 unless the rows of a step have changed on the way: then the learning rate goes on from the same share
    of the epochs, and the run has as many steps left as its rows need.
    """
    steps_per_epoch = -(-num_rows // window_rows)
    left_in_epoch = -(-(num_rows - state.rows) // window_rows)
    shift = 0 if config.max_steps else state.step - ((state.epoch + 1) * steps_per_epoch - left_in_epoch)
    length = config.max_steps or config.epochs * steps_per_epoch
    warmup = warmup_steps_of(config.warmup_steps, config.warmup_ratio, length)

    def lr(step: int) -> float:
        factor = lr_factor(
            step - shift, length, schedule=config.lr_schedule, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio
        )
        return config.learning_rate * factor

    return Plan(
        num_rows=num_rows,
        window_rows=window_rows,
        steps_per_epoch=steps_per_epoch,
        epochs=-(-length // steps_per_epoch),
        total_steps=length + shift,
        log_steps=interval_steps(config.log_interval, steps_per_epoch),
        eval_steps=interval_steps(config.eval_interval, steps_per_epoch),
        save_steps=interval_steps(config.save_interval, steps_per_epoch),
        shift=shift,
        lr=lr,
    )


def identity_of(config: Config, dtype: str, window_rows: int, weights: int) -> dict[str, Any]:
    """What decides the result of a run besides its data, under the names that --allow_change takes."""
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epochs"
    warmup = config.warmup_steps or config.warmup_ratio
    return {
        "model": f"{weights} weights, dropout {config.dropout}",
        "seed": config.seed,
        "schedule": f"{config.lr_schedule} {config.learning_rate} x {config.min_lr_ratio}, warmup {warmup}, {length}",
        "optimizer": f"{config.optimizer} {config.adam_beta1} {config.adam_beta2} {config.adam_eps}, "
        f"decay {config.weight_decay}, clip {config.grad_clip}, smoothing {config.label_smoothing}",
        "precision": dtype,
        "global_batch_size": window_rows,
    }
