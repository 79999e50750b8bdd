"""Learning from the distributions of a larger model: the loss of distillation, and what a teacher has to have."""

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.language_model import LanguageModel, Objective
from model.losses import check_smoothing, make_sft_objective, sft_terms, wide
from model.regularisers import on_embeddings

SAMPLED_WEIGHTS = 4096  # of each tensor, for the fingerprint


def make_distillation_objective(
    teacher: LanguageModel,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
    z: bool = False,
    neftune_alpha: float = 0.0,
    gradient_penalty: bool = False,
) -> Objective:
    """The terms of `make_sft_objective` and "kd", what the student has yet to learn from the teacher: see `divergence`.

    `distillation_weights(alpha)` are their weights. With alpha 0 the teacher is never run. It computes in the type of
    its own weights, also under autocast, and without noise on its embeddings. Labels are smoothed in training only, so
    that validation measures the plain cross entropy. Raises ValueError.
    """
    check_distillation(alpha, temperature)
    check_smoothing(label_smoothing)
    if alpha == 0:
        return make_sft_objective(label_smoothing, z, neftune_alpha, gradient_penalty)
    teacher.eval().requires_grad_(False)

    def objective(student: nn.Module, batch: dict) -> dict[str, Tensor]:
        hard = sft_terms(batch["targets"], label_smoothing if student.training else 0.0, z)
        place = batch["input_ids"].device.type
        with torch.no_grad(), torch.autocast(place, enabled=False):
            states, head = teacher.supervised_states(batch)  # logits come in chunks, from both models

        def terms(logits: Tensor, positions: slice) -> dict[str, Tensor]:
            with torch.no_grad(), torch.autocast(place, enabled=False):
                wanted = head(states[positions])
            return {**hard(logits, positions), "kd": divergence(logits, wanted, temperature)}

        return student(batch, terms)

    return on_embeddings(objective, neftune_alpha, gradient_penalty)


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 x the sum over positions of KL(wanted || own), both softened by T (Hinton et al. 2015); logits are (s, V).

    The factor keeps the gradient as large as that of the cross entropy whatever T is. Computed as wide as all losses.
    """
    own, wanted = ((wide(each) / temperature).log_softmax(-1) for each in (logits, wanted))
    return temperature**2 * F.kl_div(own, wanted.to(own.dtype), reduction="sum", log_target=True)


def distillation_weights(alpha: float) -> str:
    """The weights of the terms as --loss_weights takes them."""
    return f"ce={1 - alpha:.12g}, kd={alpha:.12g}"


def check_distillation(alpha: float, temperature: float) -> None:
    """Raises ValueError."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"--alpha must be in [0, 1], got {alpha}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"--temperature must be a number greater than 0, got {temperature}")


def check_teacher(
    student: LanguageModel, teacher: LanguageModel, student_tokenizer: Any, teacher_tokenizer: Any
) -> None:
    """Raises ValueError that names the first thing in which the two vocabularies differ: a token's id has to mean one.

    The student's logits and the teacher's are compared entry by entry, those beyond the tokenizers' included.
    """
    tokenizers = student_tokenizer, teacher_tokenizer
    by_id = [{number: token for token, number in each.get_vocab().items()} for each in tokenizers]
    # The teacher reads ids, so what it would make of an unknown character never comes up.
    special = [{**each.special_tokens_map, "unk_token": None} for each in tokenizers]
    sizes = [{"the number of logits": each.vocab_size} for each in (student, teacher)]
    for own, other in (by_id, special, sizes):
        for name in sorted(own.keys() | other.keys()):
            if own.get(name) != other.get(name):
                what = f"token {name}" if isinstance(name, int) else name
                raise ValueError(
                    f"the teacher has another vocabulary than the student: {what} is {other.get(name)!r} for the "
                    f"teacher and {own.get(name)!r} for the student"
                )


def fingerprint(model: nn.Module) -> str:
    """What tells the weights of a model from others: a digest of some of every tensor, whatever directory it is in."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        part = flat[:: max(1, len(flat) // SAMPLED_WEIGHTS)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + part.numpy().tobytes())
    return digest.hexdigest()[:16]
