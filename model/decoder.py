"""The built-in decoder: what a Llama-family transformer computes, and nothing about files, losses or sampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from model.attention import document_attention, rotary_angles, rotate
from model.input_embeddings import Head, LanguageModel
from model.losses import Terms, supervised_terms
from model.norm import RMSNorm
from model.parts import PartOf, block, recompute_in_backward, whole

# (q (T, heads, head_dim), k (T, kv_heads, head_dim), v like k) -> (T, heads, head_dim) in the type of v. A layer does
# not know whether its tokens are packed documents or one new token of each cached sequence: this function does.
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
    head_dim: int | None = None  # hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    initializer_range: float | None = None  # sqrt(2 / (5 hidden_size)), 0.028 at 512 (Nguyen & Salazar 2019)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.hidden_size * 3.25 / 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads // 2 if heads % 2 == 0 else heads
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * max(self.hidden_size, 1)))
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(heads, 1)
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"]
        wrong = [f"{name} {getattr(self, name)} is not positive" for name in positive if getattr(self, name) <= 0]
        if not wrong and heads % self.num_key_value_heads:
            wrong.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if not wrong and self.hidden_size % heads:
            wrong.append(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if self.head_dim % 2:
            wrong.append(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout {self.dropout} is not in [0, 1)")
        if not 0 < self.initializer_range < 1:
            wrong.append(f"initializer_range {self.initializer_range} is not in (0, 1)")
        if wrong:
            raise ValueError("impossible model shape: " + "; ".join(wrong))


def unset(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """A module whose weights are not set, since building a model must not consume the global generator."""
    return skip_init(kind, *sizes, device=torch.get_default_device(), **options)


def projection(inputs: int, outputs: int) -> nn.Module:
    return unset(nn.Linear, inputs, outputs, bias=False)


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = projection(config.hidden_size, query_size)
        self.k_proj = projection(config.hidden_size, key_size)
        self.v_proj = projection(config.hidden_size, key_size)
        self.o_proj = projection(query_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = projection(config.hidden_size, config.intermediate_size)
        self.up_proj = projection(config.hidden_size, config.intermediate_size)
        self.down_proj = projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin, attend), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Body(nn.Module):
    """All below the vocabulary projection; a module of its own so that names equal those of LlamaForCausalLM."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = unset(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(LanguageModel):
    """A dense Llama-family language model over documents laid end to end; its weights are unset until filled."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = projection(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, part_of: PartOf = whole, init: str = "fan_in") -> None:
        """Fill all weights from a CPU generator in parameter order, so that no device and no global seed plays a part.

        Embedding: normal(0, initializer_range). Projections: normal(0, std), where std is by `init`
        - fan_in: 1 / sqrt(inputs), which keeps the variance of what passes through at any width (LeCun et al. 1998)
        - normal: initializer_range
        - kaiming: sqrt(2 / inputs), the gain of ReLU (He et al. 2015, eq. 10)
        - xavier: sqrt(2 / (inputs + outputs)) (Glorot & Bengio 2010, eq. 12)
        With each of them, those that write into the residual stream are divided by sqrt(2 x layers), which keeps its
        variance at any depth (Radford et al. 2019). Where a process holds a part of a tensor, the whole is drawn and
        the part is kept, so that all ways to share a model start from the same numbers.
        """
        for name, parameter in self.named_parameters():
            part, begin = part_of(parameter)
            if parameter.dim() == 1:
                part.fill_(1.0)
                continue
            draw = torch.empty(parameter.shape).normal_(0.0, 1.0, generator=generator)[block(part, begin)]
            if name == "model.embed_tokens.weight":
                part.copy_(draw * self.config.initializer_range)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if writes_residual else 1
                outputs, inputs = parameter.shape
                precision = {
                    "fan_in": inputs, "normal": self.config.initializer_range**-2, "kaiming": inputs / 2,
                    "xavier": (inputs + outputs) / 2,
                }[init]  # fmt: skip
                part.copy_(draw / math.sqrt(precision * depth))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Final normalised states (T, hidden) of T tokens; `attends` holds one attention function per layer."""
        x = F.dropout(self.model.embed_tokens(input_ids), self.config.dropout, self.training)
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        for layer, attend in zip(self.model.layers, attends, strict=True):
            x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def enable_gradient_checkpointing(self) -> None:
        recompute_in_backward(self.shard_units())

    def forward(self, batch: dict, terms: Terms) -> dict[str, Tensor]:
        """Sums of `terms(logits, positions)` over the supervised positions of a batch of packed documents."""
        return supervised_terms(*self.supervised_states(batch), self.vocab_size, terms)

    def supervised_states(self, batch: dict) -> tuple[Tensor, Head]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return document_attention(q, k, v, batch["cu_seqlens"], batch["document_lengths"])

        attends = [attend] * self.config.num_hidden_layers
        x = self.hidden_states(batch["input_ids"], batch["position_ids"], attends)
        return x[batch["supervised_positions"]], self.lm_head

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        return list(self.model.layers)

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head): weights that multiply every input token, and those that multiply supervised positions only.

        Training costs 6 x body x tokens + 6 x head x supervised tokens floating-point operations, attention scores not
        counted. Looking up an embedding costs none.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        head = self.lm_head.weight.numel()
        return total - head * (1 if self.config.tie_word_embeddings else 2), head
