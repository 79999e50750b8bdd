"""What every module is made of: weights not yet set, of which a process may hold only a part, and recomputation."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

# What this process holds of a parameter, sharing its memory, and where that begins in the whole tensor.
PartOf = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]
Inside = tuple[slice | int, ...]  # the index of a region in a whole tensor, whose last dimensions may be left out


def unset(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """A module whose weights are not set, since building a model must not consume the global generator."""
    return skip_init(kind, *sizes, device=torch.get_default_device(), **options)


@contextlib.contextmanager
def weights_in(dtype: torch.dtype) -> Iterator[None]:
    """What is built in this block has its weights in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def projection(inputs: int, outputs: int, bias: bool = False) -> nn.Module:
    return unset(nn.Linear, inputs, outputs, bias=bias)


def whole(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """All of it, as where nothing is sharded."""
    return parameter.data, (0,) * parameter.dim()


def block(part: Tensor, begin: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of a part in its whole tensor."""
    return tuple(slice(at, at + size) for at, size in zip(begin, part.shape, strict=True))


def overlap(part: Tensor, begin: tuple[int, ...], inside: Inside) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a part of a tensor and the region `inside` the whole have in common: its index in the part, and in that.

    A whole number in `inside` stands for a dimension that the region does not have.
    """
    in_part, in_region = [], []
    for dim, (size, at) in enumerate(zip(part.shape, begin, strict=True)):
        wanted = inside[dim] if dim < len(inside) else slice(0, at + size)
        region = slice(wanted, wanted + 1) if isinstance(wanted, int) else wanted
        low = max(region.start, at)
        high = max(low, min(region.stop, at + size))
        in_part.append(slice(low - at, high - at))
        if not isinstance(wanted, int):
            in_region.append(slice(low - region.start, high - region.start))
    return tuple(in_part), tuple(in_region)


def recompute_in_backward(units: list[nn.Module]) -> None:
    """Keep only each unit's input for the backward pass and compute the rest again."""
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
