"""From a configuration or a directory of weights to a model that answers `model(batch, terms)`."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.attention import document_attention
from model.decoder import Decoder, DecoderConfig
from model.losses import Terms, supervised_terms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ATTENTION_NAME = "documents"
PROBE_TOKENS = 7
NOT_PACKABLE = "this family cannot be packed yet"


def build_model(config: DecoderConfig, seed: int) -> Decoder:
    """A float32 decoder on the CPU whose weights depend on the configuration and the seed alone."""
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(seed))
    return decoder


def load_model(source: str | Path, dropout: float = 0.0) -> "Decoder | HFCausalLM":
    """Load float32 weights from a directory or a Hub id: into the built-in decoder where it fits, else through transformers.

    `dropout` applies to the built-in decoder; other models keep what their own config.json says. Raises ValueError for
    weights that do not fit their config.json and for families whose documents cannot be kept apart.
    """
    config_file = Path(source) / "config.json"
    if config_file.is_file() and is_builtin(json.loads(config_file.read_text(encoding="utf-8"))):
        return load_pretrained(source, dropout)
    return HFCausalLM.from_pretrained(source)


def is_builtin(config: dict) -> bool:
    """Whether a config.json describes what the built-in decoder computes: Llama with plain rotary positions, no biases."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        config.get("architectures") == ["LlamaForCausalLM"]
        and config.get("hidden_act", "silu") == "silu"
        and not config.get("attention_bias", False)
        and not config.get("mlp_bias", False)
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and config.get("partial_rotary_factor", 1.0) == 1.0
    )


def config_from_json(config: dict, dropout: float = 0.0) -> DecoderConfig:
    """The decoder's configuration in a config.json that `is_builtin` accepts, with transformers' defaults for what is absent."""
    defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    rope_theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    known = {field.name for field in fields(DecoderConfig)}
    values = defaults | {name: value for name, value in config.items() if name in known}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = config["num_attention_heads"]
    return DecoderConfig(**values | {"rope_theta": rope_theta, "dropout": dropout})


def load_pretrained(directory: str | Path, dropout: float = 0.0) -> Decoder:
    """Load an exported directory (config.json and safetensors) into the built-in decoder, in float32."""
    directory = Path(directory)
    config = config_from_json(json.loads((directory / "config.json").read_text(encoding="utf-8")), dropout)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has a config.json but no .safetensors weights")
    decoder = Decoder(config)
    expected = dict(decoder.named_parameters())
    problems, seen = [], set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is not a dict
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # some writers save the tied head twice
                seen.add(name)
                if name not in expected:
                    problems.append(f"unexpected tensor {name}")
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(expected[name].shape):
                    problems.append(f"{name} has shape {shape}, config.json asks for {tuple(expected[name].shape)}")
                    continue
                expected[name].data.copy_(tensors.get_tensor(name))
    problems += [f"missing tensor {name}" for name in expected if name not in seen]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights in {directory} do not fit the model: {shown}")
    return decoder


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a directory or a Hub id, without running code from it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{source} has a {type(tokenizer).__name__}, which is not built on a tokenizer.json")
    return tokenizer


def _attention_for_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention signature, (1, heads, T, head_dim) in and (1, T, heads, head_dim) out, any mask ignored."""
    cu_seqlens, document_lengths = kwargs["documents"]
    output = document_attention(
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
        cu_seqlens,
        document_lengths,
        scale=kwargs.get("scaling"),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout", 0.0),
    )
    return output.unsqueeze(0), None


class HFCausalLM(nn.Module):
    """Any causal language model of transformers behind the decoder's contract, with that model's own parameter names."""

    def __init__(self, inner: nn.Module) -> None:
        """`inner` is a PreTrainedModel loaded with attention "documents"; it is probed at once."""
        super().__init__()
        # The inner model's children become our own, and the model itself hides in a tuple, where nn.Module does not
        # look: so every name in state_dict() and named_parameters() is the inner one, without a prefix.
        self._inner = (inner,)
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._plain_head = False
        _probe(self)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "HFCausalLM":
        """Load float32 weights from a directory or a Hub id; safetensors only, and no code from the repository."""
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION_NAME, _attention_for_transformers)
        inner = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=ATTENTION_NAME, use_safetensors=True, trust_remote_code=False
        )
        return cls(inner)

    @property
    def inner(self) -> nn.Module:
        return self._inner[0]

    @property
    def config(self):
        return self.inner.config

    def train(self, mode: bool = True) -> "HFCausalLM":
        self.inner.training = mode
        return super().train(mode)

    def forward(self, batch: dict, terms: Terms) -> dict[str, Tensor]:
        """Sums of `terms(logits, positions)` over the supervised positions of a batch of packed documents."""
        positions = batch["supervised_positions"]
        arguments = {
            "input_ids": batch["input_ids"][None],
            "position_ids": batch["position_ids"][None],
            "use_cache": False,
            "documents": (batch["cu_seqlens"], batch["document_lengths"]),
        }
        if self._plain_head:
            states = self.inner.base_model(**arguments).last_hidden_state[0]
            return supervised_terms(states[positions], self.inner.get_output_embeddings(), self.vocab_size, terms)
        if self._keeps_logits:
            logits = self.inner(**arguments, logits_to_keep=positions).logits[0]
        else:
            logits = self.inner(**arguments).logits[0][positions]
        return terms(logits, slice(0, positions.shape[0]))

    @property
    def vocab_size(self) -> int:
        return self.inner.get_output_embeddings().weight.shape[0]

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        names = set(self.inner._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head) as the built-in decoder counts them; every expert of a mixture counts as used."""
        head = self.inner.get_output_embeddings().weight
        embedding = self.inner.get_input_embeddings().weight
        total = sum(p.numel() for p in self.parameters())
        return total - head.numel() - (0 if embedding is head else embedding.numel()), head.numel()


@torch.no_grad()
def _probe(model: HFCausalLM) -> None:
    """Raise ValueError unless packed documents give the model's own logits for each one, with no influence between them.

    Run once on two tiny documents instead of keeping a list of families: some ignore the attention interface, and some
    carry state from token to token.
    """
    first, second, changed = torch.randint(1, model.vocab_size, (3, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    training, family = model.training, type(model.inner).__name__
    model.eval()
    try:
        packed = _all_logits(model, torch.cat([first, second]), 2)[PROBE_TOKENS:]
        influenced = _all_logits(model, torch.cat([changed, second]), 2)[PROBE_TOKENS:]
    except KeyError as error:
        raise ValueError(f"{family} does not pass the document boundaries to its attention: {NOT_PACKABLE}") from error
    if not torch.equal(packed, influenced):
        raise ValueError(f"in {family} one packed document changes the logits of another: {NOT_PACKABLE}")
    model.inner.set_attn_implementation("eager")
    own = model.inner(input_ids=second[None], use_cache=False).logits[0]
    model.inner.set_attn_implementation(ATTENTION_NAME)
    difference, size = (packed - own).abs().max().item(), own.abs().max().item()
    if not difference <= 1e-3 * size:
        raise ValueError(f"{family} gives other logits packed than alone (by {difference:.3g} of {size:.3g}): {NOT_PACKABLE}")
    base = model.inner.base_model
    if base is not model.inner:
        model._plain_head = True  # tried here, kept if nothing happens between the head and the logits (no soft cap, say)
        model._plain_head = torch.equal(_all_logits(model, torch.cat([first, second]), 2)[PROBE_TOKENS:], packed)
    model.train(training)


def _all_logits(model: nn.Module, input_ids: Tensor, documents: int) -> Tensor:
    """Logits (T, V) of every position of equally long packed documents."""
    length = len(input_ids) // documents
    collected: list[Tensor] = []
    batch = {
        "input_ids": input_ids,
        "position_ids": torch.arange(length).repeat(documents),
        "cu_seqlens": torch.arange(0, len(input_ids) + 1, length, dtype=torch.int32),
        "document_lengths": [length] * documents,
        "supervised_positions": torch.arange(len(input_ids)),
    }

    def collect(logits: Tensor, positions: slice) -> dict[str, Tensor]:
        collected.append(logits)
        return {}

    model(batch, collect)
    return torch.cat(collected)
