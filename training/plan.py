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
    total_steps: int
    extra_steps: int  # steps done beyond what the position in the data takes at this window size, see make_plan
    log_steps: int
    eval_steps: int
    save_steps: int
    lr: Callable[[int], float]

    @property
    def epochs(self) -> int:
        return -(-(self.total_steps - self.extra_steps) // self.steps_per_epoch)

    def due(self, step: int, interval: int) -> bool:
        """Whether what happens every `interval` steps, and at the end of the run, happens after `step`."""
        return (step - self.extra_steps) % interval == 0 or step == self.total_steps

    def epochs_done(self, state: LoopState) -> float:
        return state.epoch + state.rows / self.num_rows


def make_plan(config: Config, num_rows: int, window_rows: int, state: LoopState) -> Plan:
    """The plan from the position in `state` on.

    Step and position agree unless the rows of a step have changed on the way. Then `extra_steps` is the difference: a
    run counted in epochs has as many steps left as its rows need, and its learning rate goes on from the same share of
    them; a run counted in steps goes on counting.
    """
    steps_per_epoch = -(-num_rows // window_rows)
    left_in_epoch = -(-(num_rows - state.rows) // window_rows)
    extra_steps = state.step - ((state.epoch + 1) * steps_per_epoch - left_in_epoch)
    length, lr_shift = config.max_steps, 0
    if length is None:
        length, lr_shift = config.epochs * steps_per_epoch, extra_steps
    warmup = warmup_steps_of(config.warmup_steps, config.warmup_ratio, length)

    def lr(step: int) -> float:
        factor = lr_factor(
            step - lr_shift, length, schedule=config.lr_schedule, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio
        )
        return config.learning_rate * factor

    return Plan(
        num_rows=num_rows,
        window_rows=window_rows,
        steps_per_epoch=steps_per_epoch,
        total_steps=length + lr_shift,
        extra_steps=extra_steps,
        log_steps=interval_steps(config.log_interval, steps_per_epoch),
        eval_steps=interval_steps(config.eval_interval, steps_per_epoch),
        save_steps=interval_steps(config.save_interval, steps_per_epoch),
        lr=lr,
    )


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
