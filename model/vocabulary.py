"""More entries in the vocabulary of a model, for a tokenizer that has got new tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.input_embeddings import LanguageModel

MEAN_ROWS = 4096  # of a table that are added up at once, always the same so that the mean is


def grow(model: LanguageModel, vocab_size: int) -> None:
    """Add entries up to `vocab_size`, each with the mean of those there were; a tied head stays tied.

    On the meta device the mean is for whoever fills the model to set. Raises ValueError for a table that is something
    else than rows of numbers.
    """
    added = vocab_size - model.vocab_size
    if added <= 0:
        return
    tables: dict[int, nn.Parameter] = {}
    for module, name, tensor in list(_tables(model)):
        rows = vocab_size - added
        if len(tensor) != rows or not tensor.is_floating_point():
            raise ValueError(
                f"the vocabulary of {type(model).__name__} cannot grow: {name} has {len(tensor)} rows of {tensor.dtype}"
            )
        if id(tensor) not in tables:
            larger = tensor.new_empty(vocab_size, *tensor.shape[1:])
            if not tensor.is_meta:
                larger[:rows] = tensor.detach()
                larger[rows:] = mean_row(tensor.detach(), rows)
            tables[id(tensor)] = nn.Parameter(larger)
        setattr(module, name, tables[id(tensor)])
        for size in ("num_embeddings", "out_features"):
            if size in vars(module):
                setattr(module, size, vocab_size)
    config: Any = model.config
    for each in (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,):
        each.vocab_size = vocab_size
    model.added_entries = added


def vocabulary_tensors(model: LanguageModel) -> list[Tensor]:
    """The tensors with a row for each entry."""
    return [tensor for _, _, tensor in _tables(model)]


def mean_row(values: Any, rows: int) -> Tensor:
    """The mean of a table's rows, summed up in float64; `values`: a tensor or a slice of a file."""
    parts = [values[start : start + MEAN_ROWS].double().sum(0) for start in range(0, rows, MEAN_ROWS)]
    return (torch.stack(parts).sum(0) / rows).float()


def _tables(model: LanguageModel) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.vocabulary_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.shape[0] == model.vocab_size or name == "weight":
                yield module, name, tensor
