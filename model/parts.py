"""Weights of which a process may hold only a part: how they are named, filled, and what is recomputed."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What this process holds of a parameter, sharing its memory, and where that begins in the whole tensor.
PartOf = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]


def whole(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """All of it, as where nothing is sharded."""
    return parameter.data, (0,) * parameter.dim()


def block(part: Tensor, begin: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of a part in its whole tensor."""
    return tuple(slice(at, at + size) for at, size in zip(begin, part.shape, strict=True))


def recompute_in_backward(units: list[nn.Module]) -> None:
    """Keep only each unit's input for the backward pass and compute the rest again."""
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
