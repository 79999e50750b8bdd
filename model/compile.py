"""Compiled layers for rows that are never padded: one set of graphs for every layer and for every number of tokens.

The number of tokens changes with each micro-batch. A compiler that knows it compiles anew, or picks its kernels by the
lengths that it happened to see first, which are others in a resumed run. So only what treats all tokens alike is
compiled, and their number is marked as one that the data alone knows: the graphs cannot depend on it. Attention, which
walks from document to document, and experts, whose shares of the tokens differ, are computed as without compilation. So
are families that compute documents side by side, the trial that finds out which do, and what needs no gradient:
validation and answers would cost a second set of graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.language_model import LanguageModel


def compile_layers(model: LanguageModel) -> None:
    """Compile the token-wise parts of each layer, in place: names and weights stay what they are.

    To be called before recomputation and sharding are set up, which then happen around what is compiled here. Raises
    ValueError for a model without such parts.
    """
    import torch._dynamo.config as settings  # takes seconds

    parts = list(model.token_wise_parts())
    if not parts:
        raise ValueError("--use_compile 1: no part of this model's layers can be compiled alone; leave it out")
    settings.optimize_ddp = False  # it would cut graphs where DDP's buckets end
    settings.fail_on_recompile_limit_hit = True  # more graphs than are kept: what runs would depend on what was seen
    most = 2 * len(parts)  # graphs, where adapters make every layer another one: for inputs with a gradient and without
    settings.recompile_limit = max(settings.recompile_limit, most)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, most)
    for owner, name in parts:
        setattr(owner, name, _compiled(getattr(owner, name), model))


def _compiled(method: Callable[..., Any], model: LanguageModel) -> Callable[..., Any]:
    # Drops out the same values as without compilation.
    graph = torch.compile(method, fullgraph=True, options={"fallback_random": True})

    def run(*tensors: Tensor) -> Any:
        if not torch.is_grad_enabled() or not model.runs_compiled:
            return method(*tensors)
        for tensor in tensors:
            torch._dynamo.decorators.mark_unbacked(tensor, model.token_dim)
        return graph(*tensors)

    return run
