"""A mixture of experts: each token passes through the few of many small MLPs that a router picks for it.

The rounding of a matrix product depends on how many rows it has. How many tokens an expert gets depends on every
document of a batch, so one product per expert would let documents change each other's last bits. Here each expert
multiplies its tokens in blocks of one size, which the number of tokens alone decides; a last block is filled up with
zeros. On a GPU with a grouped kernel, whose tiles have one size anyway, one call does it all.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.partial_weights import projection

TERM_WEIGHTS = {"aux": 0.01, "router_z": 0.0}  # of `router_terms` where a user says nothing
LARGEST_BLOCK = 128  # rows; smaller ones cost speed, larger ones multiply more zeros


class Router(nn.Module):
    """One logit per expert; as wide as all losses, under autocast too, since a rounded logit picks another expert."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """The weights of all experts, stacked: each computes down(silu(gate(x)) x up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Outputs (T, K, hidden) of the K experts `chosen` (T, K) for each of the tokens x (T, hidden)."""
        num_experts, slots = self.gate_up_proj.shape[0], chosen.shape[1]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        block = block_size(chosen.numel(), num_experts)
        places, sizes = lay_out(chosen.flatten(), num_experts, block)
        with torch.autocast(device, enabled=False):
            copies = x.to(dtype).unsqueeze(1).expand(-1, slots, -1).flatten(0, 1)
            # All experts might leave a block all but empty: that much room needs no look at the sizes.
            room = chosen.numel() + num_experts * (block - 1)
            rows = copies.new_zeros(room, x.shape[1]).index_copy(0, places, copies)
            gate, up = grouped_linear(rows, self.gate_up_proj.to(dtype), sizes, block).chunk(2, dim=-1)
            outputs = grouped_linear(F.silu(gate) * up, self.down_proj.to(dtype), sizes, block)
            return outputs.index_select(0, places).unflatten(0, chosen.shape)


class Mixture(nn.Module):
    """The weighted sum of the experts that the router ranks first, by the softmax of its logits (Shazeer et al. 2017).

    `normalise` lets the weights of those that are picked add up to 1. `shared` is an MLP that every token passes, under
    a gate of its own.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, num_experts_per_tok: int, normalise: bool,
        shared: nn.Module | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts_per_tok, self.normalise = num_experts_per_tok, normalise
        self.gate = Router(hidden_size, num_experts)
        self.experts = Experts(hidden_size, intermediate_size, num_experts)
        self.shared_expert = shared
        self.shared_expert_gate = projection(hidden_size, 1) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output like x, router logits (T, experts)) of tokens x (T, hidden)."""
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(self.num_experts_per_tok, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        output = (self.experts(x, chosen) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared_expert:
            output = output + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return output, logits


def block_size(rows: int, num_experts: int) -> int:
    """Rows that an expert multiplies at once when all get `rows`: a power of two, about half of a fair share."""
    return min(LARGEST_BLOCK, 2 ** (rows // (2 * num_experts)).bit_length())


def lay_out(experts: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Where each row goes that is for `experts` (N,), one expert's rows after another's, and (num_experts,) sizes.

    Every size is a multiple of `block`, so some rows between them belong to nobody.
    """
    counts = torch.zeros(num_experts, dtype=torch.long, device=experts.device)
    counts = counts.index_add(0, experts, torch.ones_like(experts))
    sizes = (counts + block - 1) // block * block
    order = experts.argsort(stable=True)  # rows of one expert stay in the order of the tokens
    sorted_experts = experts[order]
    gaps = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    places = torch.empty_like(experts)
    places[order] = torch.arange(len(experts), device=experts.device) + gaps[sorted_experts]
    return places, sizes


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, block: int) -> Tensor:
    """x (rows, inputs) by weight (experts, outputs, inputs), `sizes` rows for each; rows beyond them are undefined."""
    if _grouped_kernel_applies(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=sizes.cumsum(0).to(torch.int32))
    return _GroupedLinear.apply(x, weight, sizes.tolist(), block)


@functools.cache
def _has_grouped_kernel(device: torch.device) -> bool:
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(device) >= (8, 0)


def _grouped_kernel_applies(x: Tensor) -> bool:
    """Whether one kernel does all groups; on a CPU torch would loop over them, and not in blocks."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and _has_grouped_kernel(x.device)


class _GroupedLinear(torch.autograd.Function):
    """Forward in blocks of one size; backward with one product per expert, whose rounding no promise covers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int], block: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        output = x.new_zeros(x.shape[0], weight.shape[1])
        used = sum(sizes)
        groups = zip(x[:used].split(sizes), output[:used].split(sizes), weight.unbind(), strict=True)
        for rows, results, matrix in groups:
            for one, result in zip(rows.split(block), results.split(block), strict=True):
                if len(one):  # an expert without rows has one empty block
                    torch.mm(one, matrix.t(), out=result)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        unused = x.shape[0] - sum(ctx.sizes)
        grads, rows = (each.split([*ctx.sizes, unused])[:-1] for each in (grad, x))
        grad_x = torch.cat([g @ matrix for g, matrix in zip(grads, weight.unbind(), strict=True)])
        if not ctx.needs_input_grad[1]:  # frozen
            return F.pad(grad_x, (0, 0, 0, unused)), None, None, None
        grad_weight = torch.stack([g.t() @ one for g, one in zip(grads, rows, strict=True)])
        return F.pad(grad_x, (0, 0, 0, unused)), grad_weight, None, None


def router_terms(logits: Sequence[Tensor], batch: dict, num_experts_per_tok: int) -> dict[str, Tensor]:
    """Sums over supervised tokens of what the router logits (T, experts) of all layers say about the experts' load.

    - aux: per document and layer, experts x the sum over experts of its share of the load x its mean probability: 1
      where all is even, up to the number of experts where one gets all (sequence-wise balance, DeepSeek-V3 eq. 17-20)
    - router_z: the squared logsumexp of the logits, which keeps them small (ST-MoE, Zoph et al. 2022)
    - max_expert_share: of the load of a document, what the busiest expert has; no gradient

    All are means over the layers and over the tokens of a document, counted once for each of its supervised tokens. A
    balance over the micro-batch, as it is often computed, is no sum over documents: how a step is shared among ranks
    and micro-batches would then change what is learnt.
    """
    lengths, every = batch["cu_seqlens"].diff(), torch.stack(tuple(logits), dim=1)  # (T, layers, experts)
    every = every.to(torch.promote_types(every.dtype, torch.float32))
    count = len(lengths)
    documents = torch.arange(count, device=lengths.device).repeat_interleave(lengths, output_size=len(every))
    supervised = torch.bincount(documents[batch["supervised_positions"]], minlength=count)

    def means(values: Tensor) -> Tensor:
        """Of each document's tokens (T, ...) -> (documents, ...)."""
        sums = values.new_zeros(count, *values.shape[1:]).index_add(0, documents, values)
        return sums / lengths.view(-1, *[1] * (values.dim() - 1))

    probabilities = every.softmax(-1)
    chosen = probabilities.detach().topk(num_experts_per_tok, dim=-1).indices
    load = means(torch.zeros_like(probabilities).scatter(-1, chosen, 1.0 / num_experts_per_tok))
    of_documents = {
        "aux": every.shape[-1] * (load * means(probabilities)).sum(-1),
        "router_z": means(every.logsumexp(-1).square()),
        "max_expert_share": load.amax(-1),
    }
    return {name: (values.mean(-1) * supervised).sum() for name, values in of_documents.items()}
