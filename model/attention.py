"""How tokens see each other: attention that knows the boundaries of packed documents."""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, document_lengths: list[int], *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention inside each document: q (T, heads, head_dim), k and v (T, kv_heads, head_dim) -> like q.

    `cu_seqlens` int32 (D + 1,) and `document_lengths` (D host integers) say the same boundaries. `scale` defaults to
    1 / sqrt(head_dim); `window` counts the visible tokens, the query's own included; `softcap` bounds the scores by
    softcap x tanh(score / softcap); `sinks` (heads,) are scores that take weight and give nothing. No value of one
    document enters the arithmetic of another.
    """
    longest = max(document_lengths)
    window = None if window is None or window >= longest else window
    # On a CPU float32 throughout: its kernel is three times slower in bfloat16 where the CPU lacks the instructions.
    dtype = v.dtype
    work = dtype if q.is_cuda else torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if not (dropout or softcap or sinks is not None) and _varlen_applies(q, v):
        return _varlen(q, k, v, cu_seqlens, longest, scale, -1 if window is None else window - 1)
    grouped, outputs = q.shape[1] != k.shape[1], []
    with torch.autocast(q.device.type, enabled=False):
        # split, not slicing: its backward writes one gradient of T tokens instead of one per document.
        for parts in zip(q.split(document_lengths), k.split(document_lengths), v.split(document_lengths), strict=True):
            one_q, one_k, one_v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            if softcap or sinks is not None:
                output = _written_out(one_q, one_k, one_v, scale, window, softcap, sinks, dropout)
            else:
                mask = None if window is None else _visible(one_q.shape[2], window, q.device)
                output = F.scaled_dot_product_attention(
                    one_q, one_k, one_v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs).to(dtype)


@functools.cache
def _varlen_kernel() -> tuple[Callable[..., Tensor], bool]:
    """The kernel and whether it takes grouped heads, as since torch 2.12; imported late, it costs seconds."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, left_window: int
) -> Tensor:
    varlen_attn, knows_groups = _varlen_kernel()
    flags = {"enable_gqa": True} if knows_groups else {}
    if not knows_groups:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(left_window, 0), **flags
    )


def _varlen_applies(q: Tensor, v: Tensor) -> bool:
    """Whether the variable-length kernel takes q: half precision, Ampere or later, head_dim a multiple of 8.

    Whoever has turned torch's flash kernels off, to differentiate twice for one, gets none here either.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] != v.shape[-1]:
        return False
    if not torch.backends.cuda.flash_sdp_enabled():
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) each query (row) of a document sees."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None,
    sinks: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """One document's attention in plain operations, for what no fused kernel here offers: soft caps and sinks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], window, q.device), -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(-1, -1, q.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : q.shape[2]].to(v.dtype)
    return F.dropout(weights, dropout) @ v
