"""From the model flags of a run to its model and tokenizer: the calls that the trainer and the other entries make."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.decoder import Decoder, DecoderConfig
from model.isolation import check_isolation
from model.loading import (
    build_model,
    build_skeleton,
    fill_from_files,
    load_model,
    load_skeleton,
    refuse_missing,
    weight_files,
)
from model.lora import add_adapters, fill_adapters
from model.partial_weights import PartOf, weights_in
from model.quantised import refuse_quantised
from model.reach import outermost
from model.trust import NO_TRUST, Trust, UnsafeModelError, refuse_unsafe_tokenizer
from model.vocabulary import grow

logger = logging.getLogger("train")

NEW = "none"
NO_BOUND = 2**20
OWN_TOKENIZER = Path(__file__).resolve().parent / "tokenizer"
OWN_TEMPLATES = Path(__file__).resolve().parent / "templates"
# Our chat templates, with the marks that a tokenizer must have for them.
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "plain": (),
}
TEMPLATE_HINT = f"name one with --chat_template FILE, or one of: {', '.join(TEMPLATES)}"


def choose_tokenizer(tokenizer: str | None, from_weight: str) -> str:
    """The directory or Hub id to read the tokenizer from: as given, else the one beside the weights, else our own."""
    return tokenizer or (str(OWN_TOKENIZER) if from_weight == NEW else from_weight)


def load_tokenizer(source: str, chat_template: str | None = None, trust: Trust = NO_TRUST) -> PreTrainedTokenizerFast:
    """The tokenizer, with the template that `chat_template` names, one of ours or a file.

    Raises ValueError where there is no fast tokenizer, no such template, or one that the tokenizer lacks marks for;
    UnsafeModelError where the tokenizer is a program.
    """
    try:
        refuse_unsafe_tokenizer(source, trust)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust.options())
    except UnsafeModelError:
        raise
    except Exception as error:  # of the files of strangers transformers trips over in many ways
        if "trust_remote_code" in str(error):
            raise UnsafeModelError(f"the tokenizer in {source} needs code of its own, which is not run") from None
        raise ValueError(f"no tokenizer in {source} ({error}); name one with --tokenizer") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {source} has no tokenizer.json, which this kit needs")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        vocabulary = tokenizer.get_vocab()
        if missing := [mark for mark in TEMPLATES.get(chat_template, ()) if mark not in vocabulary]:
            raise ValueError(
                f"--chat_template {chat_template}: the tokenizer in {source} has no token {', '.join(missing)}; "
                "--chat_template plain needs none but its end of sequence"
            )
    return tokenizer


def _read_template(named: str) -> str:
    path = OWN_TEMPLATES / f"{named}.jinja" if named in TEMPLATES else Path(named)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--chat_template {named}: neither a file nor one of {', '.join(TEMPLATES)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template {named}: cannot be read: {error}") from None


@contextlib.contextmanager
def template_hint() -> Iterator[None]:
    """Tells whoever misses a chat template in this block where to take one from."""
    try:
        yield
    except ValueError as error:
        if "has no chat_template" in str(error):
            error.args = (f"{error}: {TEMPLATE_HINT}",)
        raise


@dataclass
class ModelRequest:
    """Which model is wanted; a finished run as `from_weight` stands for its final/."""

    from_weight: str = NEW
    shape: dict[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    seed: int = 0
    init: str = "fan_in"
    param_dtype: str = "float32"
    revision: str | None = None  # of a Hub id
    trust_remote_code: bool = False
    lora: dict[str, Any] = field(default_factory=dict)  # rank, alpha, targets and dropout of adapters, if it has any

    def __post_init__(self) -> None:
        self.from_weight = weights_source(self.from_weight)
        if self.from_weight != NEW:
            refuse_quantised(self.from_weight, self.trust_in(self.from_weight))

    def trust_in(self, source: str) -> Trust:
        """What was said of the weights is true of what lies beside them."""
        return Trust(self.revision, self.trust_remote_code) if source == self.from_weight else NO_TRUST


def choose_model(request: ModelRequest, vocab_size: int, empty: bool = False, quiet: bool = False) -> nn.Module:
    """New weights of the wanted shape, or those of a directory or Hub id, which must then agree with the wanted shape.

    `empty`: on the meta device, for `fill_model` to fill where it has been sharded. `quiet`: not the model that a run
    trains, so nothing is said of it. Raises ValueError with every disagreement.
    """
    from_weight, shape, dropout = request.from_weight, request.shape, request.dropout
    trust = request.trust_in(from_weight)
    with weights_in(getattr(torch, request.param_dtype)):
        if from_weight == NEW:
            config = DecoderConfig(vocab_size=vocab_size, dropout=dropout, **shape)
            return build_skeleton(config) if empty else build_model(config, request.seed, request.init)
        model = (load_skeleton if empty else load_model)(from_weight, dropout, trust)
    if dropout and not isinstance(model, Decoder):
        raise ValueError(
            f"--dropout {dropout}: {from_weight} keeps the dropout of its own config.json; change it there"
        )
    loaded = shape_of(model, shape)
    problems = [
        f"--{name} {value}: {from_weight} has {loaded[name]}" for name, value in shape.items() if loaded[name] != value
    ]
    if problems:
        raise ValueError("\n".join(problems))
    if model.unreached and not quiet:
        frozen = sum(parameter.numel() for name, parameter in model.named_parameters() if name in model.unreached)
        named = ", ".join(outermost(model, model.unreached))
        logger.info("%s parameters that text does not reach are frozen: %s", f"{frozen:,}", named)
    if model.vocab_size < vocab_size:
        logger.log(
            logging.DEBUG if quiet else logging.WARNING,
            "the tokenizer has %d entries, the vocabulary of %s only %d: %d are added, each the mean of the old ones%s",
            vocab_size, from_weight, model.vocab_size, vocab_size - model.vocab_size,
            ", and stay so: adapters train no embeddings" if request.lora else "",
        )  # fmt: skip
        grow(model, vocab_size)
    if request.lora:
        load_base = partial(choose_model, replace(request, lora={}, param_dtype="float32"), vocab_size, quiet=True)
        add_adapters(model, from_weight, load_base, partial(weight_files, from_weight, trust), **request.lora)
        if not empty:
            fill_adapters(model, request.seed)
    return model


def fill_model(model: Any, request: ModelRequest, part_of: PartOf, dtype: torch.dtype) -> None:
    """Give an empty model the weights that `choose_model` would have, of each tensor the part that is held here.

    `dtype` is what it computes in.
    """
    if request.from_weight == NEW:
        model.initialise(torch.Generator().manual_seed(request.seed), part_of, request.init)
        return
    fill_from_files(model, request.from_weight, part_of, request.trust_in(request.from_weight))
    if request.lora:
        fill_adapters(model, request.seed, part_of)
    if not isinstance(model, Decoder):
        check_isolation(model, dtype)


def known_positions(model: Any) -> int:
    """How many positions a model can tell apart; a family that says nothing of it has no bound."""
    return getattr(text_config_of(model), "max_position_embeddings", None) or NO_BOUND


def text_config_of(model: Any) -> Any:
    """What the text part of a model goes by, which for most is the whole."""
    return model.config if isinstance(model, Decoder) else model.config.get_text_config()


def positions_of_one(model: Any) -> int:
    """Up to which length a document's rotary angles are its own; beyond, those of some models follow its neighbours.

    They stretch all positions of a batch by its longest document, packed or side by side.
    """
    config = text_config_of(model)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = list(rope.values()) if all(isinstance(part, dict) for part in rope.values()) else [rope]
    original = getattr(config, "original_max_position_embeddings", None) or known_positions(model)
    lengths = [part.get("original_max_position_embeddings") or original for part in parts if stretches(part)]
    return min([NO_BOUND, *lengths])


def stretches(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope")


def check_positions(model: Any, lengths: np.ndarray, max_seq_len: int) -> None:
    """Raises ValueError where a sample is longer than the model can tell positions apart or keep them its own.

    A row may be longer: every sample in it begins at position 0.
    """
    longest, known, own = int(lengths.max()) - 1, known_positions(model), positions_of_one(model)
    if longest > min(known, own):
        reason = f"the model knows {known} positions" if known <= own else (
            f"the angles of this model follow the longest document of a batch where one is longer than {own}, so that "
            "documents would change each other"
        )  # fmt: skip
        raise ValueError(
            f"--max_seq_len {max_seq_len}: a sample has {longest} tokens, {reason}; give --max_seq_len "
            f"{min(known, own)} and say with --overlong what to do with longer samples"
        )


def shape_of(model: Any, names: Iterable[str]) -> dict[str, int | None]:
    """The shape under the names of the flags; None for what a foreign family does not have."""
    return {name: getattr(text_config_of(model), name, None) for name in names}


def sizes_of(request: ModelRequest, vocab_size: int) -> dict[str, int] | None:
    """What a model's memory follows from, before any of its weights exist; None where that cannot be told here."""
    if request.from_weight != NEW and not Path(request.from_weight).is_dir():
        return None  # of the Hub, which is not asked for this
    shape = request.shape if request.from_weight == NEW else {}
    try:
        model = choose_model(replace(request, shape=shape, dropout=0.0), vocab_size, empty=True, quiet=True)
    except (ValueError, OSError):  # whoever builds it for good says what is wrong
        return None
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    known = {name: value or 0 for name, value in shape_of(model, names).items()}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {**known, "parameters": sum(parameter.numel() for parameter in model.parameters()), "trained": trained}


def describe_model(model: Any) -> str:
    """What the model computes, in a line: two models that differ in more than the trained weights differ in it."""
    adapters = f", {model.adapters.describe()}" if model.adapters else ""
    if isinstance(model, Decoder):
        return ", ".join(f"{name} {value}" for name, value in model.config.to_dict().items()) + adapters
    of_a_file = ("transformers_version", "dtype")  # neither is what is computed
    said = {name: value for name, value in model.config.to_diff_dict().items() if name not in of_a_file}
    config = json.dumps(said, sort_keys=True, default=str)
    return f"{type(model.inner).__name__} {hashlib.sha256(config.encode()).hexdigest()[:16]}{adapters}"


def exported_directory(path: Path) -> Path:
    """The directory that holds the weights, `path` or its final/. Raises ValueError that says what is there instead."""
    for directory in (path, path / "final"):
        if (directory / "config.json").is_file():
            return directory
    found = "has neither config.json nor final/" if path.is_dir() else "does not exist"
    raise ValueError(f"{path} {found}: name an exported model (runs/x/final) or a run that is finished (runs/x)")


def weights_source(from_weight: str) -> str:
    """--from_weight as it is loaded: a finished run stands for its final/; what is no directory is none or a Hub id."""
    if Path(from_weight).is_dir():
        return str(exported_directory(Path(from_weight)))
    refuse_missing(from_weight)
    return from_weight
