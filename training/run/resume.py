"""What decides the result of a run besides its data: a resume refuses what is not as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from training.config import Config
from training.config.stages import STAGE_FLAGS, Stage

SCHEDULE_FLAGS = (
    *(name for name in STAGE_FLAGS if name.startswith(("lr_", "warmup_")) or name.endswith(("_rate", "_ratio"))),
    "max_steps", "lr_adapt", "adaptive_every", "lr_adapt_patience", "lr_adapt_factor", "lr_adapt_threshold",
    "lr_adapt_window", "lr_adapt_cooldown", "lr_adapt_boost", "lr_adapt_drop", "lr_adapt_drop_patience", "min_lr",
    "max_lr_factor", "early_stopping_patience", "early_stopping_min_delta", "monitor_metric", "monitor_mode",
)  # fmt: skip
OBSERVED_FLAGS = ("eval_interval", "eval_samples", "eval_samples_interval")  # what policies see
OPTIMIZER_FLAGS = (
    "optimizer", "adam_beta1", "adam_beta2", "adam_eps", "amsgrad", "momentum", "weight_decay", "grad_clip",
    "ema_decay",
)  # fmt: skip
OBJECTIVE_FLAGS = ("label_smoothing", "loss_weights", "neftune_alpha", "gradient_penalty")


def identity_of(
    stages: Sequence[Stage], dtype: str, window_rows: Sequence[int], model: str, held_out: str
) -> dict[str, Any]:
    """The texts to compare, under the names that --allow_change takes; `held_out` says what evaluations measure on."""
    config = stages[0].config
    follows = config.lr_adapt != "none" or config.keep_best > 0
    schedule = (*SCHEDULE_FLAGS, *(OBSERVED_FLAGS if follows else ()))
    revision = f" at {config.revision}" if config.revision else ""
    measured_on = f" | measured on {held_out}" if follows else ""
    return {
        "model": f"{model}, dropout {config.dropout}, from {config.from_weight}{revision}, {config.init}",
        "seed": config.seed,
        "schedule": " | ".join(f"{_said(stage.config, schedule)}, {stage.epochs} epochs" for stage in stages)
        + measured_on,
        "optimizer": _said(config, OPTIMIZER_FLAGS),
        "objective": " | ".join(_said(stage.config, OBJECTIVE_FLAGS) for stage in stages),
        "precision": ", ".join([dtype, *_how_numbers_are_kept(config)]),
        "global_batch_size": " | ".join(map(str, window_rows)),
    }


def _how_numbers_are_kept(config: Config) -> list[str]:
    weights = [f"weights {config.param_dtype}"] if config.param_dtype != "float32" else []
    return [*weights, *(["compiled"] if config.use_compile else [])]


def _said(config: Config, names: Iterable[str]) -> str:
    """The flags that are not as they would be anyway, and the first of them always."""
    given = config.given
    first, *more = names
    said = [first, *(name for name in more if name in given)]
    return ", ".join(f"{name} {getattr(config, name)}" for name in said)
