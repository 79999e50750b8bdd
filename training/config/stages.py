"""The stage table: a run is a list of rows, each the configuration of the run with some of its flags replaced.

The plain run is a table of one row. The pattern of an outer loop over learning schedules and an inner loop over
mini-epochs is a row with `repeats` and `mini_epochs`; both together are epochs of the one loop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config.config import ALTERNATIVES, Config, make_config, overlay
from training.config.flags import AUTO, ConfigError, did_you_mean
from training.config.loss_weights import parse_loss_weights
from training.config.yaml_files import parse_yaml

# What a row may say besides its name, description, repeats and mini_epochs.
STAGE_FLAGS = (
    "learning_rate", "lr_schedule", "warmup_steps", "warmup_ratio", "min_lr_ratio", "lr_cycles", "lr_decay_ratio",
    "lr_power", "lr_interval", "lr_gamma", "lr_milestones", "lr_peak_ratio", "lr_start_ratio", "lr_warmup_epochs",
    "loss_weights", "batch_size", "accumulation_steps", "global_batch_size", "max_seq_len", "data_path", "max_tokens",
    "files_per_epoch", "file_fraction",
)  # fmt: skip
OWN_KEYS = ("name", "description", "repeats", "mini_epochs")


@dataclass(frozen=True)
class Stage:
    """One row of the table, complete."""

    name: str
    description: str
    repeats: int
    mini_epochs: int  # of each repeat
    config: Config

    @property
    def epochs(self) -> int:
        return self.repeats * self.mini_epochs


def read_stages(config: Config) -> list[Stage]:
    """The rows of --stages, a file or its text; without it the run itself. Raises ConfigError with all problems."""
    if config.stages is None:
        return [Stage("train", "", 1, config.epochs, config)]
    place, rows = _rows_of(config.stages)
    plain = dataclasses.replace(config, stages=None)
    stages: list[Stage] = []
    names: set[str] = set()
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"{place}, row {number}"
        if not isinstance(row, dict):
            problems.append(f"{where}: expected 'flag: value' lines, found {type(row).__name__}")
            continue
        name = str(row.get("name") or f"stage {number}")
        where += f" ({name})"
        counts = {key: row.get(key, 1) for key in ("repeats", "mini_epochs")}
        wrong = [key for key, n in counts.items() if not isinstance(n, int) or isinstance(n, bool) or n < 1]
        problems += [f"{where}: {key} {counts[key]} is no whole number from 1" for key in wrong]
        flags = {key: value for key, value in row.items() if key not in OWN_KEYS}
        foreign = [key for key in flags if key not in STAGE_FLAGS]
        known = (*OWN_KEYS, *STAGE_FLAGS)
        problems += [f"{where}: {key}{did_you_mean(str(key), known)} is none of {', '.join(known)}" for key in foreign]
        if name in names:
            problems.append(f"{where}: the name is given twice")
        names.add(name)
        try:
            counts = dict.fromkeys(counts, 1) if wrong else counts
            epochs = counts["repeats"] * counts["mini_epochs"]
            given = {key: value for key, value in flags.items() if key not in foreign}
            merged = make_config(overlay(plain.given, {**given, "epochs": epochs}))
            if merged.batch_size == AUTO != plain.batch_size:
                problems.append(f"{where}: batch_size auto is for all that give no number: --batch_size auto")
            stages.append(Stage(name, str(row.get("description") or ""), config=merged, **counts))
        except ConfigError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return stages


def check_terms(stages: Iterable[Stage]) -> None:
    """ValueError for the weight of a term that no objective of ours has."""
    for stage in stages:
        config = stage.config
        has = {"ce": True, "z": True, "gp": config.gradient_penalty > 0, "kd": config.teacher is not None}
        has |= dict.fromkeys(
            ("aux", "router_z"), bool(config.use_moe or config.num_experts or config.from_weight != "none")
        )
        known = [term for term, there in has.items() if there]
        if unknown := [term for term in parse_loss_weights(config.loss_weights) if term not in known]:
            hints = {"kd": "; kd needs --teacher", "gp": "; gp needs --gradient_penalty", "aux": "; aux needs experts"}
            raise ValueError(
                f"--loss_weights {unknown[0]}: the terms are {', '.join(known)}{hints.get(unknown[0], '')}"
            )


ADAPT, CYCLE = ("plateau", "adaptive"), ("one_cycle", "mini_epoch")
# A flag that does something only where another one has one of these values, or any but its default.
WORKS_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "lr_cycles": ("lr_schedule", ("cosine_restarts",)),
    "lr_decay_ratio": ("lr_schedule", ("wsd",)),
    "lr_power": ("lr_schedule", ("polynomial",)),
    "lr_interval": ("lr_schedule", ("step", "exponential")),
    "lr_gamma": ("lr_schedule", ("step", "multistep", "exponential", "mini_epoch")),
    "lr_milestones": ("lr_schedule", ("multistep",)),
    "lr_peak_ratio": ("lr_schedule", ("one_cycle",)),
    "lr_start_ratio": ("lr_schedule", CYCLE),
    "lr_warmup_epochs": ("lr_schedule", ("mini_epoch",)),
    **dict.fromkeys(("adaptive_every", "lr_adapt_patience", "lr_adapt_factor", "min_lr"), ("lr_adapt", ADAPT)),
    **dict.fromkeys(("lr_adapt_threshold", "lr_adapt_cooldown"), ("lr_adapt", ADAPT)),
    **dict.fromkeys(("lr_adapt_window", "lr_adapt_boost", "lr_adapt_drop"), ("lr_adapt", ("adaptive",))),
    **dict.fromkeys(("lr_adapt_drop_patience", "max_lr_factor"), ("lr_adapt", ("adaptive",))),
    "momentum": ("optimizer", ("sgd", "muon")),
    **dict.fromkeys(("alpha", "temperature", "teacher_dtype"), ("teacher", ())),
    "early_stopping_min_delta": ("early_stopping_patience", ()),
    "eval_samples_interval": ("eval_samples", ()),
}


def idle_flags(stages: Sequence[Stage]) -> list[str]:
    """A line for each flag that was given and does nothing in any stage."""
    lines = []
    for name, (switch, values) in WORKS_WITH.items():
        default = getattr(Config, name)
        given = [stage.config for stage in stages if getattr(stage.config, name) != default]
        settings = [getattr(config, switch) for config in given]
        if given and not any(value in values if values else value != getattr(Config, switch) for value in settings):
            wanted = f"--{switch} {' or '.join(values)}".strip()
            lines.append(f"--{name} {getattr(given[0], name)} does nothing without {wanted}")
    return lines


def weighs(stages: Iterable[Stage], term: str) -> bool:
    """Whether any stage has a weight for a loss term."""
    return any(term in parse_loss_weights(stage.config.loss_weights) for stage in stages)


def stages_as_text(stages: list[Stage], first: Config) -> str:
    """The table with every flag in which a row differs from the run, as --stages takes it.

    A flag stands beside its alternative also where it is that of the run, from which the other one would take it.
    """
    rows = []
    for stage in stages:
        own = {name: getattr(stage.config, name) for name in STAGE_FLAGS}
        told = {name for name, value in own.items() if value != getattr(first, name)}
        told |= {name for pair in ALTERNATIVES if told & set(pair) for name in pair}
        rows.append({
            "name": stage.name, "description": stage.description,
            "repeats": stage.repeats, "mini_epochs": stage.mini_epochs,
            **{name: value for name, value in own.items() if name in told},
        })  # fmt: skip
    return json.dumps(rows, ensure_ascii=False)  # YAML, which reads it, knows no surrogates


def _rows_of(text: str) -> tuple[str, list[Any]]:
    """Where the table stands, and its rows. Raises ConfigError."""
    if text.lstrip().startswith("["):
        place, content = "--stages", text
    else:
        place = f"--stages {text}"
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{place}: cannot be read: {error}"]) from None
    rows = parse_yaml(content, place)
    if isinstance(rows, dict) and rows.keys() == {"stages"}:
        rows = rows["stages"]
    if not isinstance(rows, list) or not rows:
        raise ConfigError([f"{place}: expected a list of stages"])
    return place, rows
