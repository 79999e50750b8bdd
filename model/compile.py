"""Compiled layers for rows that are never padded: one set of graphs for every layer and for every number of tokens.

The number of tokens changes with each micro-batch. A compiler that knows it compiles anew, or picks its kernels by the
lengths that it happened to see first, which are others in a resumed run. So only what treats all tokens alike is
compiled, and their number is marked as one that the data alone knows: the graphs cannot depend on it. Attention, which
walks from document to document, and experts, whose shares of the tokens differ, are computed as without compilation. So
are families that compute documents side by side, and what needs no gradient: validation and answers would cost a second
set of graphs.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder import Decoder, Layer
from model.isolation import PACKED
from model.loading import HFCausalLM


def compile_layers(model: Decoder | HFCausalLM) -> None:
    """Compile the token-wise parts of each layer, in place: names and weights stay what they are.

    To be called before recomputation and sharding are set up, which then happen around what is compiled here. Raises
    ValueError for a model without such parts.
    """
    import torch._dynamo.config as settings  # takes seconds

    settings.optimize_ddp = False  # it would cut graphs where DDP's buckets end
    settings.fail_on_recompile_limit_hit = True  # more graphs than are kept: what runs would depend on what was seen
    token_dim = 0 if isinstance(model, Decoder) else 1  # behind a batch of one

    def is_one_line() -> bool:  # documents side by side are of a number that the graphs would depend on
        return isinstance(model, Decoder) or model.reading == PACKED

    parts = [part for layer in model.shard_units() for part in token_wise_parts(layer)]
    if not parts:
        raise ValueError("--use_compile 1: no part of this model's layers can be compiled alone; leave it out")
    for owner, name in parts:
        setattr(owner, name, _compiled(getattr(owner, name), token_dim, is_one_line))


def token_wise_parts(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Methods of a layer that make of tokens as many tokens and let none see another: module and name.

    In a layer of transformers these are its children that take nothing but the tokens: norms and MLPs.
    """
    if isinstance(layer, Layer):
        yield from ((layer, name) for name in layer.token_wise)
        return
    for child in layer.children():
        takes = inspect.signature(child.forward).parameters
        mixture = any(name.rpartition(".")[2] == "experts" for name, _ in child.named_modules())
        if len(takes) == 1 and not mixture and any(True for _ in child.parameters()):
            yield child, "forward"


def _compiled(method: Callable[..., Any], token_dim: int, is_one_line: Callable[[], bool]) -> Callable[..., Any]:
    # Drops out the same values as without compilation.
    graph = torch.compile(method, fullgraph=True, options={"fallback_random": True})

    def run(*tensors: Tensor) -> Any:
        if not torch.is_grad_enabled() or not is_one_line():
            return method(*tensors)
        for tensor in tensors:
            torch._dynamo.decorators.mark_unbacked(tensor, token_dim)
        return graph(*tensors)

    return run
