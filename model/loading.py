"""From a configuration or a directory of weights to a model that answers `model(batch, terms)`."""

import contextlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.attention import document_attention
from model.decoder import Decoder, DecoderConfig
from model.families import decoder_config, in_files, is_builtin
from model.input_embeddings import Head, LanguageModel
from model.losses import Terms, supervised_terms
from model.moe import TERM_WEIGHTS, router_terms
from model.parts import Inside, PartOf, overlap, recompute_in_backward, whole
from model.trust import read_object, refuse_unsafe_weights

logger = logging.getLogger("train")

ATTENTION_NAME = "documents"
FLOATS = ("F64", "F32", "F16", "BF16")
NOT_PACKABLE = "this family cannot be packed yet"
# Families whose router takes the first of a softmax, and says before it the logits; others balance in other ways.
ROUTED_BY_SOFTMAX = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
PROBE_TOKENS = 7  # of each of the two documents that a loaded model is tried on


def build_skeleton(config: DecoderConfig) -> Decoder:
    """A decoder on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return Decoder(config)


def build_model(config: DecoderConfig, seed: int, init: str = "fan_in") -> Decoder:
    """A float32 decoder on the CPU whose weights depend on the configuration, the seed and `init` alone."""
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(seed), init=init)
    return decoder


def load_model(source: str | Path, dropout: float = 0.0) -> "Decoder | HFCausalLM":
    """The weights of a directory or a Hub id, in the built-in decoder where it fits and through transformers else.

    They are float32, or of the type of `weights_in` around the call, and are read right into it. `dropout` is the
    decoder's; other models keep what their own config.json says. Raises ValueError for weights that do not fit their
    config.json and for families whose packed documents would influence each other; UnsafeModelError for what is a
    program.
    """
    if is_builtin_directory(source):
        decoder = Decoder(_decoder_config_in(source, dropout))
        fill_from_files(decoder, source)
        return decoder
    model = HFCausalLM.from_pretrained(source)
    check_isolation(model, 1e-3 if torch.get_default_dtype() == torch.float32 else 0.05)
    return model


def load_skeleton(source: str | Path, dropout: float = 0.0) -> "Decoder | HFCausalLM":
    """The model of `load_model` without memory for its weights; once it has some, `fill_from_files` sets them."""
    if is_builtin_directory(source):
        return build_skeleton(_decoder_config_in(source, dropout))
    return HFCausalLM.skeleton(source)


def is_builtin_directory(source: str | Path) -> bool:
    """Whether the built-in decoder computes what lies there. Raises ValueError where nothing does."""
    if not Path(source).is_dir() and (str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))):
        raise ValueError(f"no model in {source}: there is no such directory")
    refuse_unsafe_weights(source)
    return (Path(source) / "config.json").is_file() and is_builtin(read_config(source))


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a directory; ValueError where it is no JSON object."""
    return read_object(Path(directory) / "config.json")


def _decoder_config_in(directory: str | Path, dropout: float) -> DecoderConfig:
    try:
        return decoder_config(read_config(directory), dropout)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def fill_from_files(model: "Decoder | HFCausalLM", source: str | Path, part_of: PartOf = whole) -> None:
    """Read the weights of a directory or a Hub id into a model, of each tensor only the part that is held here.

    Raises ValueError where the files are damaged or do not fit the model, naming the first differences.
    """

    def put(values: Any, tensor: Tensor, inside: Inside = ()) -> None:
        """What is held here of the values, a tensor or a slice of a file, that belong `inside` a tensor."""
        part, begin = part_of(tensor)
        in_part, in_values = overlap(part, begin, inside)
        if (own := part.detach()[in_part]).numel():
            own.copy_(values[in_values])

    wanted = _wanted_tensors(model)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    missing, wrong = _as_in_files(model, wanted), []
    for file in _weight_files(source):
        with _opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if name in tied:
                    continue  # some writers save the tied head a second time
                tensor, inside, expected = missing.pop(name, (None, (), ()))
                shape, dtype = tuple(stored.get_slice(name).get_shape()), stored.get_slice(name).get_dtype()
                if tensor is None:
                    wrong.append(f"{name} is not part of it")
                elif shape != expected:
                    wrong.append(f"{name} is {shape} and should be {expected}")
                elif tensor.is_floating_point() and dtype not in FLOATS:
                    wrong.append(f"{name} holds {dtype}, not one of {', '.join(FLOATS)}")
                else:
                    put(stored.get_slice(name) if shape else stored.get_tensor(name), tensor, inside)
    wrong += [f"{name} is missing" for name in missing]
    if wrong and isinstance(model, HFCausalLM):  # the family stores its weights otherwise than it holds them
        logger.warning("the weights of %s have to be converted: every process holds a full copy for a moment", source)
        converted = HFCausalLM.from_pretrained(source).inner.state_dict()
        for name, tensor in wanted.items():
            put(converted[name], tensor)
    elif wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights in {source} do not fit its config.json: {'; '.join(wrong[:5])}{more}")


def _wanted_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the files have to hold: parameters, a tied one once, and persistent buffers."""
    parameters = dict(model.named_parameters())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {**parameters, **{name: tensor for name, tensor in model.state_dict().items() if name not in names}}


def _as_in_files(model: nn.Module, wanted: dict[str, Tensor]) -> dict[str, tuple[Tensor | None, Inside, tuple]]:
    """Stored name -> the tensor that it belongs to, where inside that, and the shape that it must have."""
    if not isinstance(model, Decoder):
        return {name: (tensor, (), tuple(tensor.shape)) for name, tensor in wanted.items()}
    return {
        stored: (tensor, inside, tuple(torch.empty(tensor.shape, device="meta")[inside].shape))
        for name, tensor in wanted.items()
        for stored, inside in in_files(name, tuple(tensor.shape))
    }


def _weight_files(source: str | Path) -> list[Path]:
    directory = Path(source)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source} has a config.json and no model.safetensors")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        stored = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    with stored:
        yield stored


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


@contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Our attention known to transformers, and its errors as ValueError in words that name the source."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_for_transformers)
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no model in {source}: {error}") from None
    except KeyError as error:  # some families look their attention up in a table of their own
        raise ValueError(f"the model in {source} takes no other attention: {NOT_PACKABLE}") from error


def logits_already(states: Tensor) -> Tensor:
    """The head of a model that does not say what its head is."""
    return states


class HFCausalLM(LanguageModel):
    """A causal language model of transformers behind the decoder's contract, under its own parameter names."""

    def __init__(self, inner: nn.Module) -> None:
        """`inner`: a PreTrainedModel loaded with our attention; `check_isolation` tells whether it uses it."""
        super().__init__()
        # The inner model's children become our own, and the model itself hides in a tuple, where nn.Module does not
        # look: so the names in state_dict() and named_parameters() are the inner ones, without a prefix.
        self._inner = (inner,)
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._routers = _routers_of(inner)
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._plain_head = False

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "HFCausalLM":
        """The weights of a directory or a Hub id, typed as in `load_model`; safetensors only, no code from there."""
        from transformers import AutoModelForCausalLM

        with _explained(source):
            inner, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.get_default_dtype(),
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if info["missing_keys"]:  # transformers fills them with random numbers and a warning
            raise ValueError(f"the weights in {source} lack {', '.join(sorted(info['missing_keys'])[:5])}")
        return cls(inner)

    @classmethod
    def skeleton(cls, source: str | Path) -> "HFCausalLM":
        """The same model without memory for its parameters; buffers, which no file holds, are computed."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        with _explained(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with init_empty_weights(include_buffers=False):
                inner = AutoModelForCausalLM.from_config(
                    config, dtype=torch.get_default_dtype(), attn_implementation=ATTENTION_NAME,
                    trust_remote_code=False,
                )  # fmt: skip
        inner.tie_weights()
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
        recompute_in_backward(self.shard_units())

    def forward(self, batch: dict, terms: Terms) -> dict[str, Tensor]:
        """Sums of `terms(logits, positions)` over the supervised positions of packed documents, and `router_terms`."""
        routing: list[Tensor] = []
        with contextlib.ExitStack() as stack:  # only for now: in the backward pass a layer may run once more
            for router in self._routers:
                stack.enter_context(router.register_forward_hook(lambda *call: routing.append(call[2][0])))
            states, head = self.supervised_states(batch)
        if head is logits_already:
            sums = terms(states, slice(0, len(states)))
        else:
            sums = supervised_terms(states, head, self.vocab_size, terms)
        return {**sums, **router_terms(routing, batch, self.config.num_experts_per_tok)} if routing else sums

    def supervised_states(self, batch: dict) -> tuple[Tensor, Head]:
        """As declared; where a family does more between states and logits than a head, the states are the logits."""
        positions = batch["supervised_positions"]
        arguments = {
            "input_ids": batch["input_ids"][None],
            "position_ids": batch["position_ids"][None],
            "use_cache": False,
            "documents": (batch["cu_seqlens"], batch["document_lengths"]),
        }
        if self._plain_head:
            states = self.inner.base_model(**arguments).last_hidden_state[0, positions]
            return states, self.inner.get_output_embeddings()
        if self._keeps_logits:
            return self.inner(**arguments, logits_to_keep=positions).logits[0], logits_already
        return self.inner(**arguments).logits[0, positions], logits_already

    @property
    def term_weights(self) -> dict[str, float]:
        return TERM_WEIGHTS if self._routers else {}

    @property
    def vocab_size(self) -> int:
        return self.inner.get_output_embeddings().weight.shape[0]

    def input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order."""
        names = set(self.inner._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head) as the decoder counts them; every expert of a mixture counts as used."""
        embedding, head = self.inner.get_input_embeddings().weight, self.inner.get_output_embeddings().weight
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - head.numel() - (0 if embedding is head else embedding.numel()), head.numel()


def _routers_of(inner: Any) -> list[nn.Module]:
    """The modules whose first output is the router logits (T, experts) of a layer."""
    if inner.config.model_type in ROUTED_BY_SOFTMAX:
        kind = inner._can_record_outputs["router_logits"].target_class
        return [module for module in inner.modules() if isinstance(module, kind)]
    if any(name.endswith(".experts") for name, _ in inner.named_modules()):
        logger.warning("%s: the balance of its experts is not trained (no term aux)", type(inner).__name__)
    return []


def check_isolation(model: HFCausalLM, tolerance: float = 1e-3) -> None:
    """Raise ValueError unless a packed document gets the model's own logits and no influence from its neighbour.

    One trial instead of a list of families: some never call the attention that they are given, some carry state from
    token to token, some do more to the scores than they say. Influence is a gradient that is not exactly zero: equal
    logits would be too much to ask of a mixture, whose matrix products change their shape, and so their rounding.
    `tolerance`: largest difference from the logits of a document alone, as a share of the largest logit.
    """
    numbers = torch.Generator().manual_seed(0)
    first, second = torch.randint(1, model.vocab_size, (2, PROBE_TOKENS), generator=numbers)
    training, family = model.training, type(model.inner).__name__
    model.eval()
    embedded: list[Tensor] = []
    hook = model.input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    try:
        packed = _last_logits(model, [first, second])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{family} fails on packed documents ({error}): {NOT_PACKABLE}") from error
    hook.remove()
    (influence,) = torch.autograd.grad(packed.square().sum(), embedded)
    if influence[0, :PROBE_TOKENS].any():
        raise ValueError(f"one packed document changes the logits of another in {family}: {NOT_PACKABLE}")
    with torch.no_grad():
        model.inner.set_attn_implementation("eager")
        alone = _last_logits(model, [second])
        model.inner.set_attn_implementation(ATTENTION_NAME)
        difference, size = (packed - alone).abs().max().item(), alone.abs().max().item()
        if not difference <= tolerance * size:  # also false for NaN
            raise ValueError(f"{family} computes other logits packed than alone ({difference:.2g} off): {NOT_PACKABLE}")
        if model.inner.base_model is not model.inner:
            # The head may be applied outside, in chunks, if nothing but the head stands between states and logits.
            model._plain_head = True
            model._plain_head = torch.equal(_last_logits(model, [first, second]), packed)
    model.train(training)


def _last_logits(model: HFCausalLM, documents: list[Tensor]) -> Tensor:
    """Logits (tokens, V) of the last of some packed documents."""
    lengths, device = [len(document) for document in documents], model.inner.get_input_embeddings().weight.device
    batch = {
        "input_ids": torch.cat(documents).to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).to(device),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        "document_lengths": lengths,
        "supervised_positions": torch.arange(sum(lengths) - lengths[-1], sum(lengths)).to(device),
    }
    logits: list[Tensor] = []

    def collect(chunk: Tensor, positions: slice) -> dict[str, Tensor]:
        logits.append(chunk)
        return {}

    model(batch, collect)
    return torch.cat(logits)
