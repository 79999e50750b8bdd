"""The built-in decoder: what transformers of the Llama and Qwen families compute, and nothing about files or sampling.

One network with options: each is a line where it acts, and all of them off is Llama.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import document_attention
from model.language_model import Head, LanguageModel
from model.losses import Terms, supervised_terms
from model.moe import TERM_WEIGHTS, Mixture, router_terms
from model.norm import RMSNorm
from model.partial_weights import PartOf, block, projection, recompute_in_backward, unset, whole
from model.rope import rotary_angles, rotate, scaling_problems

# (q (T, heads, head_dim), k (T, kv_heads, head_dim), v like k) -> (T, heads, head_dim) in the type of v. A layer does
# not know whether its tokens are packed documents or one new token of each cached sequence: this function does.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class DecoderConfig:
    """Shape of a decoder, in the field names of transformers; None means derived from the other fields, or left out."""

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
    rope_scaling: dict[str, Any] | None = None  # rope_type and its numbers, see model/rope.py
    qk_norm: bool | None = None  # a norm of each query and key head (Qwen3); on where all experts are routed
    qkv_bias: bool = False  # of the projections to queries, keys and values (Qwen2)
    num_experts: int | None = None  # in place of each layer's MLP, see model/moe.py
    num_experts_per_tok: int | None = None  # 2
    moe_intermediate_size: int | None = None  # so that the experts of a token are as wide as the one MLP would be
    norm_topk_prob: bool | None = None  # the weights of a token's experts add up to 1; True
    shared_expert_intermediate_size: int | None = None  # of an MLP besides, that every token passes

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.hidden_size * 3.25 / 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads // 2 if heads % 2 == 0 else heads
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * max(self.hidden_size, 1)))
        uneven = self.head_dim is None and heads > 0 and self.hidden_size % heads > 0
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(heads, 1)
        self._derive_experts()
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"]
        positive += [name for name in EXPERT_SIZES if getattr(self, name) is not None]
        wrong = [f"{name} {getattr(self, name)} is not positive" for name in positive if getattr(self, name) <= 0]
        if not wrong and heads % self.num_key_value_heads:
            wrong.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if not wrong and uneven:
            wrong.append(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if self.head_dim % 2:
            wrong.append(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout {self.dropout} is not in [0, 1)")
        if not 0 < self.initializer_range < 1:
            wrong.append(f"initializer_range {self.initializer_range} is not in (0, 1)")
        wrong += scaling_problems(self.rope_scaling) if self.rope_scaling is not None else []
        wrong += self._expert_problems()
        if wrong:
            raise ValueError("impossible model shape: " + "; ".join(wrong))

    def _derive_experts(self) -> None:
        shared = self.shared_expert_intermediate_size
        if self.num_experts is not None:
            self.num_experts_per_tok = 2 if self.num_experts_per_tok is None else self.num_experts_per_tok
            self.norm_topk_prob = self.norm_topk_prob is not False
            if self.moe_intermediate_size is None and self.num_experts_per_tok > 0:
                wanted = (self.intermediate_size - (shared or 0)) / self.num_experts_per_tok
                self.moe_intermediate_size = max(8, math.ceil(wanted / 8) * 8)
        if self.qk_norm is None:
            self.qk_norm = self.num_experts is not None and shared is None

    def _expert_problems(self) -> list[str]:
        """Also what no family of transformers computes, since nobody else could open it."""
        if self.qk_norm and self.qkv_bias:
            return ["qk_norm and qkv_bias are of two families, and none has both"]
        if self.num_experts is None:
            return [f"{name} needs num_experts" for name in EXPERT_SIZES[1:] if getattr(self, name) is not None]
        if self.num_experts_per_tok > self.num_experts:
            return [f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"]
        if self.qk_norm == (self.shared_expert_intermediate_size is not None):
            return ["experts come with qk_norm (as in Qwen3-MoE) or with shared_expert_intermediate_size (Qwen2-MoE)"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """What transformers would have to know: the shape, and of the options those that are on."""
        options = {name for name, value in vars(DecoderConfig).items() if value is None or value is False}
        return {n: v for n, v in asdict(self).items() if n != "dropout" and (v or n not in options)}


EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = projection(config.hidden_size, query_size, config.qkv_bias)
        self.k_proj = projection(config.hidden_size, key_size, config.qkv_bias)
        self.v_proj = projection(config.hidden_size, key_size, config.qkv_bias)
        self.o_proj = projection(query_size, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, what comes before tokens see each other."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = projection(hidden_size, intermediate_size)
        self.up_proj = projection(hidden_size, intermediate_size)
        self.down_proj = projection(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def mixture(config: DecoderConfig) -> Mixture:
    shared_size = config.shared_expert_intermediate_size
    return Mixture(
        config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok,
        config.norm_topk_prob, FeedForward(config.hidden_size, shared_size) if shared_size else None,
    )  # fmt: skip


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), whose place a mixture of experts may take."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        dense = config.num_experts is None
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size) if dense else mixture(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout
        self.token_wise = ("before", "after" if dense else "between")  # methods that treat all tokens alike

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """The states after the layer, and the router logits (T, experts) of a mixture."""
        attended = attend(*self.before(x, cos, sin))
        if not isinstance(self.mlp, Mixture):
            return self.after(x, attended), None
        x, normal = self.between(x, attended)
        output, router_logits = self.mlp(normal)
        return x + self._dropped(output), router_logits

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.heads(self.input_layernorm(x), cos, sin)

    def between(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The states after attention, and what the feed-forward is given of them."""
        x = x + self._dropped(self.self_attn.o_proj(attended.flatten(-2)))
        return x, self.post_attention_layernorm(x)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normal = self.between(x, attended)
        return x + self._dropped(self.mlp(normal))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Body(nn.Module):
    """All below the vocabulary projection; a module of its own so that names equal those of transformers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = unset(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(LanguageModel):
    """A language model over documents laid end to end; its weights are unset until filled."""

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

        Embedding, routers: normal(0, initializer_range). Biases: 0. Projections: normal(0, std), where std is by `init`
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
                part.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            draw = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)[block(part, begin)]
            if name.endswith(("embed_tokens.weight", "mlp.gate.weight", "shared_expert_gate.weight")):
                part.copy_(draw * self.config.initializer_range)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                depth = 2 * self.config.num_hidden_layers if writes_residual else 1
                outputs, inputs = parameter.shape[-2:]
                outputs = outputs // 2 if name.endswith("gate_up_proj") else outputs  # two projections in one
                precision = {
                    "fan_in": inputs, "normal": self.config.initializer_range**-2, "kaiming": inputs / 2,
                    "xavier": (inputs + outputs) / 2,
                }[init]  # fmt: skip
                part.copy_(draw / math.sqrt(precision * depth))

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attends: Sequence[Attend]
    ) -> tuple[Tensor, list[Tensor]]:
        """Final normalised states (T, hidden) of T tokens, and each layer's router logits (T, experts) if it has any.

        `attends` holds one attention function per layer.
        """
        x = F.dropout(self.model.embed_tokens(input_ids), self.config.dropout, self.training)
        config, routing = self.config, []
        cos, sin = rotary_angles(position_ids, config.head_dim, config.rope_theta, config.rope_scaling)
        for layer, attend in zip(self.model.layers, attends, strict=True):
            x, router_logits = layer(x, cos, sin, attend)
            routing += [] if router_logits is None else [router_logits]
        return self.model.norm(x), routing

    def enable_gradient_checkpointing(self) -> None:
        recompute_in_backward(self.shard_units())

    def forward(self, batch: dict, terms: Terms) -> dict[str, Tensor]:
        """Sums of `terms(logits, positions)` over the supervised positions of packed documents, and `router_terms`."""
        states, routing = self._states(batch)
        sums = supervised_terms(states, self.lm_head, self.vocab_size, terms)
        return {**sums, **router_terms(routing, batch, self.config.num_experts_per_tok)} if routing else sums

    def supervised_states(self, batch: dict) -> tuple[Tensor, Head]:
        return self._states(batch)[0], self.lm_head

    def _states(self, batch: dict) -> tuple[Tensor, list[Tensor]]:
        """States (S, hidden) at the supervised positions, and the router logits at all positions."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return document_attention(q, k, v, batch["cu_seqlens"], batch["document_lengths"])

        attends = [attend] * self.config.num_hidden_layers
        x, routing = self.hidden_states(batch["input_ids"], batch["position_ids"], attends)
        return x[batch["supervised_positions"]], routing

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def term_weights(self) -> dict[str, float]:
        return {} if self.config.num_experts is None else TERM_WEIGHTS

    def input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def vocabulary_modules(self) -> list[nn.Module]:
        return [self.model.embed_tokens, self.lm_head]

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        return list(self.model.layers)

    def token_wise_parts(self) -> Iterator[tuple[nn.Module, str]]:
        return ((layer, name) for layer in self.model.layers for name in layer.token_wise)

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head): how many weights multiply each input token, and how many each supervised position only.

        Training costs 6 x body x tokens + 6 x head x supervised tokens floating-point operations, attention scores not
        counted. Looking up an embedding costs none.
        """
        config, total = self.config, sum(parameter.numel() for parameter in self.parameters())
        head = self.lm_head.weight.numel()
        idle = sum(parameter.numel() for name, parameter in self.named_parameters() if ".experts." in name)
        idle -= idle // config.num_experts * config.num_experts_per_tok if idle else 0
        return total - idle - head * (1 if config.tie_word_embeddings else 2), head
