"""Models of transformers behind the decoder's contract: packed documents in, terms out, under their own names."""

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.attention import document_attention
from model.isolation import APART, PACKED
from model.language_model import Head, LanguageModel
from model.losses import Terms, supervised_terms
from model.moe import TERM_WEIGHTS, router_terms
from model.partial_weights import recompute_in_backward
from model.trust import NO_TRUST, Trust, read_json

logger = logging.getLogger("train")

ATTENTION_NAME = "documents"
# Families whose router takes the first of a softmax, and says before it the logits; others balance in other ways.
ROUTED_BY_SOFTMAX = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# Buffers that older files hold and models compute: frequencies of positions, masks of what is causal.
COMPUTED = re.compile(r"rotary\w*\.(original_)?inv_freq$|\.(attn|attention)\.(masked_)?bias$")
APART_CALLS = 2  # in which a model computes documents apart, for the short ones not to be padded like the long ones


def _attention_for_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' signature: (1, heads, T, head_dim) in, (1, T, heads, head_dim) out; a mask, if any, is ignored."""
    if "documents" not in kwargs:
        raise ValueError(f"{type(module).__name__} is not told the document boundaries")
    cu_seqlens, document_lengths, told = kwargs["documents"]
    if told is not None:
        told.append(kwargs.get("sliding_window"))
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
    except ValueError as error:
        if "for this kind of AutoModel" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise ValueError(f"the model in {source} is no causal language model that transformers knows: {said}") from None


def _with_our_attention(load: Callable[..., Any]) -> Any:
    """What `load` gives with our attention, or with plain one where a family looks it up in a table that lacks ours."""
    try:
        return load(attn_implementation=ATTENTION_NAME)
    except KeyError:
        return load(attn_implementation="eager")


def _auto_class(config: dict[str, Any]) -> Any:
    """What of transformers opens the whole of a model: as a model of text alone, it would lose what sees and hears."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    kind, named = config.get("model_type"), (config.get("architectures") or [None])[0]
    with_images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, "") == named
    of_text = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == named
    return AutoModelForImageTextToText if with_images and not of_text else AutoModelForCausalLM


def logits_already(states: Tensor) -> Tensor:
    """The head of a model that does not say what its head is."""
    return states


class HFCausalLM(LanguageModel):
    """A causal language model of transformers behind the decoder's contract, under its own parameter names."""

    token_dim = 1  # behind a batch of one

    def __init__(self, inner: nn.Module) -> None:
        """`inner`: a PreTrainedModel loaded with our attention; `check_isolation` finds out whether that is enough."""
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
        self.unreached = []
        self.attention = inner.config._attn_implementation
        self.reading = PACKED if self.attention == ATTENTION_NAME else APART
        self.told: list[int | None] | None = None  # of windows, by the layers, while it is tried

    @classmethod
    def from_pretrained(cls, source: str | Path, trust: Trust = NO_TRUST) -> "HFCausalLM":
        """The weights of a directory or a Hub id, typed as in `load_model`; safetensors only.

        Code of its own is run only where that is trusted.
        """
        with _explained(source):
            inner, info = _with_our_attention(
                partial(
                    _auto_class(read_json(source, "config.json", trust)).from_pretrained,
                    source,
                    dtype=torch.get_default_dtype(),
                    use_safetensors=True,
                    output_loading_info=True,
                    **trust.options(),
                )
            )
        if info["missing_keys"]:  # transformers fills them with random numbers and a warning
            raise ValueError(f"the weights in {source} lack {', '.join(sorted(info['missing_keys'])[:5])}")
        if unknown := sorted(name for name in info["unexpected_keys"] if not COMPUTED.search(name)):
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""  # which nobody would save again
            raise ValueError(
                f"the weights in {source} do not fit its config.json: {type(inner).__name__} has no "
                f"{', '.join(unknown[:5])}{more}"
            )
        return cls(inner)

    @classmethod
    def skeleton(cls, source: str | Path, trust: Trust = NO_TRUST) -> "HFCausalLM":
        """The same model without memory for its parameters; buffers, which no file holds, are computed."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with _explained(source):
            config = AutoConfig.from_pretrained(source, **trust.options())
            auto_class = _auto_class(read_json(source, "config.json", trust))
            make = partial(auto_class.from_config, trust_remote_code=False)
            if trust.code and (named := (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")):
                own_class = get_class_from_dynamic_module(named, source, code_revision=trust.revision)
                own_class.register_for_auto_class("AutoModelForCausalLM")  # an export copies its code
                make = own_class._from_config
            with init_empty_weights(include_buffers=False):
                inner = _with_our_attention(partial(make, config, dtype=torch.get_default_dtype()))
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
        positions, head = batch["supervised_positions"], logits_already
        if self._plain_head:
            head = self.inner.get_output_embeddings()
        if self.reading == APART:
            return self._states_apart(batch)[positions], head
        arguments = {"input_ids": batch["input_ids"][None], "use_cache": False}
        if self.reading == PACKED:
            documents = batch["cu_seqlens"], batch["document_lengths"], self.told
            arguments |= {"position_ids": batch["position_ids"][None], "documents": documents}
        if self._keeps_logits and not self._plain_head:
            return self.inner(**arguments, logits_to_keep=positions).logits[0], head
        return self._states(**arguments)[0, positions], head

    def _states(self, **arguments: Any) -> Tensor:
        """(lines, T, hidden or V): what the head takes if that is all that follows, else logits."""
        return self.inner.base_model(**arguments)[0] if self._plain_head else self.inner(**arguments).logits

    def _states_apart(self, batch: dict) -> Tensor:
        """Each document in a line of its own, the longer half of the tokens in one call and the shorter in another.

        What is causal does not look at the padding, which is on the right. The number of calls depends on nothing,
        since in each of them all processes that share a model exchange its weights.
        """
        lengths, embedded = batch["document_lengths"], self.input_embeddings()(batch["input_ids"][None])[0]
        documents, states, seen = embedded.split(lengths), {}, 0
        calls: list[list[int]] = [[] for _ in range(APART_CALLS)]
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            calls[seen * APART_CALLS // sum(lengths)].append(number)
            seen += lengths[number]
        for call in calls:
            lines = pad_sequence([documents[number] for number in call] or [embedded[:1]], batch_first=True)
            output = self._states(inputs_embeds=lines, use_cache=False)
            states |= {number: line[: lengths[number]] for number, line in zip(call, output, strict=False)}
            if not call:  # nothing of it counts, and the backward pass still comes by
                states[len(lengths)] = output[0, :0]
        return torch.cat([states[number] for number in sorted(states)])

    def read_apart(self) -> None:
        """Compute the documents of a row apart from now on, with an attention that the family has."""
        if self.reading == PACKED:  # else it has been made with the one that it has
            self.attention = "sdpa" if self.inner._supports_sdpa else "eager"
        self.reading, self._plain_head, self._routers = APART, False, []
        self.config._attn_implementation = self.attention  # also where only the mask follows it, as in BLOOM

    def use_plain_head(self, probe: Callable[[], Tensor]) -> None:
        """Apply the head outside, in chunks, if it is given the states themselves and gives the logits themselves.

        `probe` makes some logits.
        """
        base, head, keeps_logits = self.inner.base_model, self.inner.get_output_embeddings(), self._keeps_logits
        if base is self.inner:
            return
        given, states, made, logits = [], [], [], []
        hooks = [
            head.register_forward_hook(lambda *call: given.append(call[1][0])),
            head.register_forward_hook(lambda *call: made.append(call[2])),
            base.register_forward_hook(lambda *call: states.append(call[2][0])),
            self.inner.register_forward_hook(lambda *call: logits.append(call[2].logits)),
        ]
        self._keeps_logits = self._plain_head = False
        probe()
        self._keeps_logits = keeps_logits
        for hook in hooks:
            hook.remove()
        pairs = list(zip([*states, *made], [*given, *logits], strict=False))
        self._plain_head = len(pairs) == 2 * len(states) and all(torch.equal(a, b) for a, b in pairs)

    @property
    def term_weights(self) -> dict[str, float]:
        return TERM_WEIGHTS if self._routers else {}

    @property
    def vocab_size(self) -> int:
        return self.inner.get_output_embeddings().weight.shape[0]

    def input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def vocabulary_modules(self) -> list[nn.Module]:
        return [self.inner.get_input_embeddings(), self.inner.get_output_embeddings()]

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in forward order; of those that lie inside each other the outermost."""
        kinds = set(self.inner._no_split_modules or ())
        units = {name: module for name, module in self.named_modules() if type(module).__name__ in kinds}
        return [unit for name, unit in units.items() if not any(name.startswith(f"{other}.") for other in units)]

    def token_wise_parts(self) -> Iterator[tuple[nn.Module, str]]:
        """Those children of a layer that take nothing but the tokens: norms and MLPs."""
        for child in (child for layer in self.shard_units() for child in layer.children()):
            takes = inspect.signature(child.forward).parameters
            mixture = any(name.rpartition(".")[2] == "experts" for name, _ in child.named_modules())
            if len(takes) == 1 and not mixture and any(True for _ in child.parameters()):
                yield child, "forward"

    @property
    def runs_compiled(self) -> bool:
        """Not with documents side by side, on whose number the graphs would depend, nor while the model is tried."""
        return self.reading == PACKED and self.told is None

    def parameter_counts(self) -> tuple[int, int]:
        """(body, head) as the decoder counts them, of what text reaches; every expert of a mixture counts as used."""
        embedding, head = self.inner.get_input_embeddings().weight, self.inner.get_output_embeddings().weight
        total = sum(parameter.numel() for name, parameter in self.named_parameters() if name not in self.unreached)
        return total - head.numel() - (0 if embedding is head else embedding.numel()), head.numel()


def _routers_of(inner: Any) -> list[nn.Module]:
    """The modules whose first output is the router logits (T, experts) of a layer."""
    if inner.config.model_type in ROUTED_BY_SOFTMAX:
        kind = inner._can_record_outputs["router_logits"].target_class
        return [module for module in inner.modules() if isinstance(module, kind)]
    if any(name.endswith(".experts") for name, _ in inner.named_modules()):
        logger.warning("%s: the balance of its experts is not trained (no term aux)", type(inner).__name__)
    return []
