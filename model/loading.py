"""From a configuration or a directory of weights to a model that answers `model(batch, terms)`."""

import inspect
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import document_attention
from model.decoder import Decoder, DecoderConfig
from model.losses import Terms, supervised_terms
from model.trust import read_object, refuse_unsafe_weights

ATTENTION_NAME = "documents"
FLOATS = ("F64", "F32", "F16", "BF16")
NOT_PACKABLE = "this family cannot be packed yet"
PROBE_TOKENS = 7  # of each of the two documents that a loaded model is tried on


def build_model(config: DecoderConfig, seed: int) -> Decoder:
    """A float32 decoder on the CPU whose weights depend on the configuration and the seed alone."""
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(seed))
    return decoder


def load_model(source: str | Path, dropout: float = 0.0) -> "Decoder | HFCausalLM":
    """Float32 weights of a directory or a Hub id, in the built-in decoder where it fits and through transformers else.

    `dropout` is the decoder's; other models keep what their own config.json says. Raises ValueError for weights that do
    not fit their config.json and for families whose packed documents would influence each other; UnsafeModelError for
    what is a program.
    """
    if not Path(source).is_dir() and (str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))):
        raise ValueError(f"no model in {source}: there is no such directory")
    refuse_unsafe_weights(source)
    if (Path(source) / "config.json").is_file() and is_builtin(read_config(source)):
        return load_pretrained(source, dropout)
    return HFCausalLM.from_pretrained(source)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a directory; ValueError where it is no JSON object."""
    return read_object(Path(directory) / "config.json")


def is_builtin(config: dict[str, Any]) -> bool:
    """Whether a config.json describes what the decoder computes: Llama, no biases, plain rotary positions, SiLU."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        config.get("architectures") == ["LlamaForCausalLM"]
        and config.get("hidden_act", "silu") == "silu"
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
        and not config.get("quantization_config")
        and rope.get("rope_type", rope.get("type", "default")) == "default"
    )


def decoder_config(config: dict[str, Any], dropout: float = 0.0) -> DecoderConfig:
    """The shape in a config.json that `is_builtin` accepts, with LlamaConfig's defaults for what it leaves out.

    Raises ValueError for a shape that is incomplete or impossible.
    """
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise ValueError(f"config.json has no whole number for {', '.join(missing)}")
    values: dict[str, Any] = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "num_key_value_heads": config["num_attention_heads"],
    }
    known = {field.name for field in fields(DecoderConfig)}
    values |= {name: value for name, value in config.items() if name in known and value is not None}
    values |= {"rope_theta": (config.get("rope_parameters") or config).get("rope_theta", 10000.0), "dropout": dropout}
    return DecoderConfig(**values)


def load_pretrained(directory: str | Path, dropout: float = 0.0) -> Decoder:
    """An exported directory (config.json and model*.safetensors) in the built-in decoder, in float32."""
    directory = Path(directory)
    try:
        config = decoder_config(read_config(directory), dropout)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has a config.json and no model.safetensors")
    decoder = Decoder(config)
    missing = dict(decoder.named_parameters())
    wrong = []
    for file in files:
        try:
            stored = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        with stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # some writers save the tied head a second time
                parameter = missing.pop(name, None)
                shape, dtype = tuple(stored.get_slice(name).get_shape()), stored.get_slice(name).get_dtype()
                if parameter is None:
                    wrong.append(f"{name} is not part of it")
                elif shape != tuple(parameter.shape):
                    wrong.append(f"{name} is {shape} and should be {tuple(parameter.shape)}")
                elif dtype not in FLOATS:
                    wrong.append(f"{name} holds {dtype}, not one of {', '.join(FLOATS)}")
                else:
                    parameter.data.copy_(stored.get_tensor(name))
    wrong += [f"{name} is missing" for name in missing]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights in {directory} do not fit its config.json: {'; '.join(wrong[:5])}{more}")
    return decoder


def _attention_for_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' signature: (1, heads, T, head_dim) in, (1, T, heads, head_dim) out; a mask, if any, is ignored."""
    if "documents" not in kwargs:
        raise ValueError(f"{type(module).__name__} is not told the document boundaries: {NOT_PACKABLE}")
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
    """A causal language model of transformers behind the decoder's contract, under its own parameter names."""

    def __init__(self, inner: nn.Module) -> None:
        """`inner`: a PreTrainedModel loaded with our attention; raises ValueError if it cannot keep documents apart."""
        super().__init__()
        # The inner model's children become our own, and the model itself hides in a tuple, where nn.Module does not
        # look: so the names in state_dict() and named_parameters() are the inner ones, without a prefix.
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
        """Float32 weights of a directory or a Hub id; safetensors only, and no code from the repository."""
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION_NAME, _attention_for_transformers)
        try:
            inner, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"no model in {source}: {error}") from None
        except KeyError as error:  # some families look their attention up in a table of their own
            raise ValueError(f"the model in {source} takes no other attention: {NOT_PACKABLE}") from error
        if info["missing_keys"]:  # transformers fills them with random numbers and a warning
            raise ValueError(f"the weights in {source} lack {', '.join(sorted(info['missing_keys'])[:5])}")
        return cls(inner)

    @property
    def inner(self) -> Any:
        return self._inner[0]

    @property
    def config(self) -> Any:
        return self.inner.config

    def train(self, mode: bool = True) -> "HFCausalLM":
        self.inner.training = mode
        return super().train(mode)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        for layer in self.shard_units():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

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
            states = self.inner.base_model(**arguments).last_hidden_state[0, positions]
            return supervised_terms(states, self.inner.get_output_embeddings(), self.vocab_size, terms)
        if self._keeps_logits:
            logits = self.inner(**arguments, logits_to_keep=positions).logits[0]
        else:
            logits = self.inner(**arguments).logits[0, positions]
        return terms(logits, slice(0, len(positions)))

    @property
    def vocab_size(self) -> int:
        return self.inner.get_output_embeddings().weight.shape[0]

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        names = set(self.inner._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head) as the decoder counts them; every expert of a mixture counts as used."""
        embedding, head = self.inner.get_input_embeddings().weight, self.inner.get_output_embeddings().weight
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - head.numel() - (0 if embedding is head else embedding.numel()), head.numel()


def _probe(model: HFCausalLM) -> None:
    """Raise ValueError unless a packed document gets the model's own logits and no influence from its neighbour.

    One trial instead of a list of families: some never call the attention that they are given, some carry state from
    token to token, some do more to the scores than they say. Influence is a gradient that is not exactly zero: equal
    logits would be too much to ask of a mixture, whose matrix products change their shape, and so their rounding.
    """
    numbers = torch.Generator().manual_seed(0)
    first, second = torch.randint(1, model.vocab_size, (2, PROBE_TOKENS), generator=numbers)
    training, family = model.training, type(model.inner).__name__
    model.eval()
    embedded: list[Tensor] = []
    hook = model.inner.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    try:
        packed = _second_logits(model, first, second)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{family} fails on packed documents ({error}): {NOT_PACKABLE}") from error
    hook.remove()
    (influence,) = torch.autograd.grad(packed.square().sum(), embedded)
    if influence[0, :PROBE_TOKENS].any():
        raise ValueError(f"one packed document changes the logits of another in {family}: {NOT_PACKABLE}")
    with torch.no_grad():
        model.inner.set_attn_implementation("eager")
        alone = model.inner(input_ids=second[None], use_cache=False).logits[0]
        model.inner.set_attn_implementation(ATTENTION_NAME)
        difference, size = (packed - alone).abs().max().item(), alone.abs().max().item()
        if not difference <= 1e-3 * size:  # also false for NaN
            raise ValueError(f"{family} computes other logits packed than alone ({difference:.2g} off): {NOT_PACKABLE}")
        if model.inner.base_model is not model.inner:
            # The head may be applied outside, in chunks, if nothing but the head stands between states and logits.
            model._plain_head = True
            model._plain_head = torch.equal(_second_logits(model, first, second), packed)
    model.train(training)


def _second_logits(model: HFCausalLM, first: Tensor, second: Tensor) -> Tensor:
    """Logits (tokens, V) of the second of two packed documents."""
    lengths = [len(first), len(second)]
    batch = {
        "input_ids": torch.cat([first, second]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        "document_lengths": lengths,
        "supervised_positions": torch.arange(lengths[0], sum(lengths)),
    }
    logits: list[Tensor] = []

    def collect(chunk: Tensor, positions: slice) -> dict[str, Tensor]:
        logits.append(chunk)
        return {}

    model(batch, collect)
    return torch.cat(logits)
