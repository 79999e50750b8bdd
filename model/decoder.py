"""The built-in decoder: what a Llama-family transformer computes, and nothing about files, losses or sampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import document_attention
from model.losses import Terms, supervised_terms

# (q (T, heads, head_dim), k (T, kv_heads, head_dim), v like k) -> (T, heads, head_dim). A layer does not know whether
# its tokens are packed training documents or one new token of each cached sequence: this function does.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class DecoderConfig:
    """Shape of a decoder, in the field names of transformers' LlamaConfig; None means derived from the other fields."""

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int | None = None  # 3.25 x hidden_size, rounded up to a multiple of 64
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # half of num_attention_heads where that is whole
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        heads = max(self.num_attention_heads, 1)
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.hidden_size * 3.25 / 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads // 2 if heads % 2 == 0 else heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // heads
        self._validate()

    def _validate(self) -> None:
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
        problems = [f"{name} must be positive, got {getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 < self.initializer_range < 1.0:
            problems.append(f"initializer_range must be in (0, 1), got {self.initializer_range}")
        if problems:
            raise ValueError("impossible model shape: " + "; ".join(problems))


class Linear(nn.Linear):
    """A bias-free projection whose weight stays unset until `Decoder.initialise` or a loader fills it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing: construction must not consume the global generator."""


class Embedding(nn.Embedding):
    """A token table whose weight stays unset until `Decoder.initialise` or a loader fills it."""

    def reset_parameters(self) -> None:
        """Draw nothing: construction must not consume the global generator."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, head_dim / 2) of the rotary angles (Su et al. 2021), computed in at least float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).to(wide) / head_dim
    angles = position_ids.to(wide)[:, None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x (T, heads, head_dim): the half-split order of Hugging Face weights."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Body(nn.Module):
    """Everything below the vocabulary projection; exists so that parameter names equal those of LlamaForCausalLM."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A dense Llama-family language model over a flat sequence of documents; its weights are unset until filled."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fill the weights from a CPU generator, in parameter order, so that the device and the global seed play no part.

        Normal(0, initializer_range); the two projections that write into the residual stream are divided by
        sqrt(2 x layers), which keeps its variance independent of depth (Radford et al. 2019).
        """
        residual_std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.initializer_range
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Final normalised states (T, hidden) of T tokens; `attends` holds one attention function per layer."""
        x = self.model.embed_tokens(input_ids)
        x = F.dropout(x, self.config.dropout, self.training)
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer, attend in zip(self.model.layers, attends, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def forward(self, batch: dict, terms: Terms) -> dict[str, Tensor]:
        """Sums of `terms(logits, positions)` over the supervised positions of a batch of packed documents."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return document_attention(q, k, v, batch["cu_seqlens"], batch["document_lengths"])

        attends = [attend] * self.config.num_hidden_layers
        x = self.hidden_states(batch["input_ids"], batch["position_ids"], attends)
        return supervised_terms(x[batch["supervised_positions"]], self.lm_head, self.config.vocab_size, terms)

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        return list(self.model.layers)

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head): weights that work on every input token, and those that work on supervised positions only.

        The training cost of a batch is 6 x body x tokens + 6 x head x supervised tokens floating-point operations,
        attention scores not counted. The embedding is a look-up and costs none, unless tied: then it is the head.
        """
        head = self.lm_head.weight.numel()
        embedding = 0 if self.config.tie_word_embeddings else head
        return sum(p.numel() for p in self.parameters()) - head - embedding, head
