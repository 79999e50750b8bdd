"""From states at supervised positions to sums of loss terms: the chunked head and the objectives made of terms."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.language_model import Head, Objective
from model.regularisers import on_embeddings

Weights = dict[str, float]

# (logits (s, V), slice of the batch's targets that they belong to) -> sums over those s positions.
Terms = Callable[[Tensor, slice], dict[str, Tensor]]

# Logit elements alive at once. Above it the logits are made chunk by chunk and remade in the backward pass, which costs
# one more multiplication by the head and keeps memory flat; at 2^26 a chunk's float32 logits are 256 MiB.
MAX_LOGITS = 2**26


def supervised_terms(states: Tensor, head: Head, vocab_size: int, terms: Terms) -> dict[str, Tensor]:
    """Add up `terms` over chunks of states (S, hidden), S = 0 included; all logits never exist at once."""
    rows = max(1, MAX_LOGITS // vocab_size)
    count = states.shape[0]
    if count <= rows:
        return terms(head(states), slice(0, count))

    def chunk_terms(start: int) -> dict[str, Tensor]:
        chunk = slice(start, min(start + rows, count))
        return checkpoint(lambda x: terms(head(x), chunk), states[chunk], use_reentrant=False)

    parts = [chunk_terms(start) for start in range(0, count, rows)]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def wide(logits: Tensor) -> Tensor:
    """Logits in the precision of all losses: float32, or float64 for a float64 model."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sft_terms(targets: Tensor, label_smoothing: float = 0.0, z: bool = False) -> Terms:
    """The terms of `make_sft_objective` for a batch with these targets (S,)."""

    def terms(logits: Tensor, positions: slice) -> dict[str, Tensor]:
        logits, expected = wide(logits), targets[positions]
        ce = F.cross_entropy(logits, expected, reduction="sum", label_smoothing=label_smoothing)
        sums = {"ce": ce, "correct": (logits.detach().argmax(-1) == expected).sum()}
        return {**sums, "z": logits.logsumexp(-1).square().sum()} if z else sums

    return terms


def make_sft_objective(
    label_smoothing: float = 0.0, z: bool = False, neftune_alpha: float = 0.0, gradient_penalty: bool = False
) -> Objective:
    """An objective returning {"ce": summed token losses in nats, "correct": count of tokens ranked first, no gradient}.

    The cross entropy is computed in float32 (float64 for a float64 model), also under autocast. `z` adds "z", the
    squared logsumexp of the logits (PaLM, Chowdhery et al. 2022); for the other two see model/regularisers.py.
    """
    check_smoothing(label_smoothing)

    def objective(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        return model(batch, sft_terms(batch["targets"], label_smoothing, z))

    return on_embeddings(objective, neftune_alpha, gradient_penalty)


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


sft_objective = make_sft_objective()


def loss_of(terms: dict[str, Tensor], weights: Weights) -> Tensor:
    """What is learnt from: the terms that have a gradient, each as often as its weight says or once.

    Raises ValueError for a weight of a term that the objective does not have.
    """
    if unknown := weights.keys() - terms.keys():
        known = [name for name, term in terms.items() if term.requires_grad]
        raise ValueError(f"--loss_weights {', '.join(unknown)}: the terms of this objective are {', '.join(known)}")
    learnt = {name: term for name, term in terms.items() if term.requires_grad}
    weighed = {name: term for name, term in learnt.items() if weights.get(name, 1.0)} or learnt
    return sum(weights.get(name, 1.0) * term for name, term in weighed.items())  # type: ignore[return-value]
