"""Fine-tune a student under a teacher: `torchrun --nproc_per_node N -m scripts.train_distillation --teacher DIR ...`.

It is the trainer with one loss term more, and takes all flags of the trainer: data, checkpoints, resume and the result
are those of train_full_sft.py. The weights of the two terms are --loss_weights like any other.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config.command_line import config_from_command_line
from training.config.config import Config, compute_dtype
from training.config.loss_weights import parse_loss_weights
from training.config.stages import read_stages, stages_as_text, weighs
from training.control.lock import lock_or_exit

ALPHA = 0.7


def weights_of_terms(loss_weights: str, alpha: float | None) -> str:
    """--loss_weights with those of the two terms that it does not name; ValueError where both say something else."""
    from model.distillation import distillation_weights

    given, own = parse_loss_weights(loss_weights), distillation_weights(ALPHA if alpha is None else alpha)
    named = {name: weight for name, weight in parse_loss_weights(own).items() if name in given}
    if alpha is not None and any(given[name] != weight for name, weight in named.items()):
        raise ValueError(f"--alpha {alpha} means {own}, --loss_weights says {loss_weights}: give one of the two")
    missing = [item for item in own.split(", ") if item.split("=")[0] not in given]
    return ", ".join([*missing, *filter(None, [loss_weights])])


def distill(config: Config) -> dict[str, Any]:
    """`train_full_sft.run` with a teacher. Raises what that raises, and ValueError for a teacher that does not fit."""
    import train_full_sft
    from dataset.tokenizer import vocabulary_size
    from model.build import (
        ModelRequest,
        choose_model,
        choose_tokenizer,
        known_positions,
        load_tokenizer,
        positions_of_one,
        weights_source,
    )
    from model.distillation import check_teacher, fingerprint, make_distillation_objective
    from model.loading import load_model
    from trainer_utils import environment_rank
    from training.control.process import setup_logging
    from training.device import choose_device

    rank, local_rank, _ = environment_rank()
    setup_logging(rank)
    if config.teacher is None:
        raise ValueError("--teacher is missing: the directory of a model, a finished run or a Hub id")
    alpha = ALPHA if config.alpha is None else config.alpha
    if alpha == 0:
        train_full_sft.logger.warning("--alpha 0: this is the trainer alone, no teacher is loaded")
        plain = {name: getattr(Config, name) for name in ("teacher", "alpha", "temperature", "teacher_dtype")}
        return train_full_sft.run(replace(config, **plain))
    if config.stages is not None:  # a row that weighs other terms must not lose the teacher
        rows = [
            replace(stage, config=replace(s, loss_weights=weights_of_terms(s.loss_weights, config.alpha)))
            for stage, s in ((stage, stage.config) for stage in read_stages(config))
        ]
        config = replace(config, stages=stages_as_text(rows, config))
    config = replace(config, loss_weights=weights_of_terms(config.loss_weights, config.alpha))

    source, wanted = weights_source(config.teacher), ModelRequest(**config.model_request)
    tokenizer_source = choose_tokenizer(config.tokenizer, wanted.from_weight)
    tokenizer = load_tokenizer(tokenizer_source, config.chat_template, wanted.trust_in(tokenizer_source))
    student = choose_model(wanted, vocabulary_size(tokenizer), empty=True)
    teacher = load_model(source)
    check_teacher(student, teacher, tokenizer, load_tokenizer(source))
    known = min(known_positions(teacher), positions_of_one(teacher))
    if config.max_seq_len > known:
        raise ValueError(f"--max_seq_len {config.max_seq_len}: the teacher knows {known} positions")
    taught_by = f"teacher {fingerprint(teacher)}"

    device = choose_device(config.device, local_rank, saves_memory=config.strategy == "fsdp")
    own = config.teacher_dtype if config.teacher_dtype != "auto" else config.dtype
    dtype_name = compute_dtype(own, config.param_dtype, on_gpu=device.type == "cuda")
    move(teacher, device, dtype_name)
    train_full_sft.logger.info("teacher: %s in %s", source, dtype_name)
    objective = make_distillation_objective(
        teacher, alpha, config.temperature, config.label_smoothing,
        z=weighs(read_stages(config), "z"),
        neftune_alpha=config.neftune_alpha, gradient_penalty=config.gradient_penalty > 0,
    )  # fmt: skip
    identity = {"objective": f"{taught_by} in {dtype_name}, alpha {alpha}, temperature {config.temperature}"}
    return train_full_sft.run(config, objective, extra_identity=identity)


def move(teacher: Any, device: Any, dtype_name: str) -> None:
    """Weights to the device in a type; buffers, such as rotary frequencies, keep theirs."""
    import torch

    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(device, getattr(torch, dtype_name))
    teacher.to(device)


def main(config: Config) -> int:
    import train_full_sft

    return train_full_sft.main(config, distill)


if __name__ == "__main__":
    CONFIG = config_from_command_line(prog="torchrun -m scripts.train_distillation")
    if os.environ.get("RANK", "0") == "0" and not CONFIG.dry_run:  # before torch is imported, as in the trainer
        LOCK = lock_or_exit(Path(CONFIG.save_dir))
    from training.control.process import end_process

    end_process(main(CONFIG))
