"""From the model flags of a run to its model and tokenizer: the calls that the trainer and the other entries make."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.decoder import DecoderConfig
from model.loading import build_model, load_model

NEW = "none"
OWN_TOKENIZER = Path(__file__).resolve().parent / "tokenizer"
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def choose_tokenizer(tokenizer: str | None, from_weight: str) -> str:
    """The directory or Hub id to read the tokenizer from: as given, else the one beside the weights, else our own."""
    return tokenizer or (str(OWN_TOKENIZER) if from_weight == NEW else from_weight)


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Raises ValueError where there is no fast tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {source} ({error}); name one with --tokenizer") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {source} has no tokenizer.json, which this kit needs")
    return tokenizer


def choose_model(from_weight: str, shape: dict[str, int], dropout: float, seed: int, vocab_size: int) -> nn.Module:
    """New weights of the wanted shape, or those of a directory or Hub id, which must then agree with the wanted shape.

    Raises ValueError with every disagreement.
    """
    if from_weight == NEW:
        return build_model(DecoderConfig(vocab_size=vocab_size, dropout=dropout, **shape), seed)
    model = load_model(from_weight, dropout=dropout)
    loaded = shape_of(model)
    problems = [
        f"--{name} {value}: {from_weight} has {loaded[name]}" for name, value in shape.items() if loaded[name] != value
    ]
    if model.config.vocab_size < vocab_size:
        problems.append(
            f"--tokenizer: it has {vocab_size} entries, the vocabulary of {from_weight} only {model.config.vocab_size}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return model


def shape_of(model: Any) -> dict[str, int | None]:
    """The shape under the names of the flags; None for what a foreign family does not have."""
    return {name: getattr(model.config, name, None) for name in SHAPE}
