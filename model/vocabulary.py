"""More entries in the vocabulary of a model, for a tokenizer that has got new tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from model.language_model import LanguageModel

MEAN_ROWS = 4096  # of a table that are added up at once, always the same so that the mean is


def grow(model: LanguageModel, vocab_size: int) -> None:
    """Add entries up to `vocab_size`, each with the mean of those there were; a tied head stays tied.

    On the meta device the mean is for whoever fills the model to set. Raises ValueError where embeddings and head have
    not the same entries.
    """
    added = vocab_size - model.vocab_size
    if added <= 0:
        return
    rows, (embedding, head) = model.vocab_size, model.vocabulary_modules()
    tied = head.weight is embedding.weight
    for module in (embedding, head):
        for name in _tables(module, rows):
            old = getattr(module, name).detach()
            if len(old) != rows:
                raise ValueError(f"the vocabulary cannot grow: {name} has {len(old)} rows and the head {rows}")
            if module is head and name == "weight" and tied:
                head.weight = embedding.weight
                continue
            larger = old.new_empty(vocab_size, *old.shape[1:])
            if not old.is_meta:
                larger[:rows], larger[rows:] = old, mean_row(old, rows)
            setattr(module, name, nn.Parameter(larger))
        for size in ("num_embeddings", "out_features"):
            if size in vars(module):
                setattr(module, size, vocab_size)
    config: Any = model.config
    for each in (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,):
        each.vocab_size = vocab_size
    model.added_entries = added


def vocabulary_tensors(model: LanguageModel) -> list[Tensor]:
    """The tensors with a row for each entry."""
    return [
        getattr(module, name) for module in model.vocabulary_modules() for name in _tables(module, model.vocab_size)
    ]


def mean_row(values: Any, rows: int) -> Tensor:
    """The mean of a table's rows, summed up in float64; `values`: a tensor or a slice of a file."""
    parts = [values[start : start + MEAN_ROWS].double().sum(0) for start in range(0, rows, MEAN_ROWS)]
    return (torch.stack(parts).sum(0) / rows).float()


def _tables(module: nn.Module, rows: int) -> list[str]:
    return [n for n, tensor in module.named_parameters(recurse=False) if n == "weight" or tensor.shape[0] == rows]
