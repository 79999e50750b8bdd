"""What every model here is, and what trains one."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Any]
Objective = Callable[[nn.Module, dict], dict[str, Tensor]]  # (model, batch) -> named sums over supervised tokens
Head = Callable[[Tensor], Tensor]  # states (S, hidden) -> logits (S, V)


class LanguageModel(nn.Module):
    """What objectives use of a model besides `model(batch, terms)`."""

    vocab_size: int
    added_entries = 0  # of the vocabulary, at its end, since `model.vocabulary.grow`
    adapters: Any = None  # see model/lora.py
    unreached: list[str] = []  # parameters that text does not reach, see model/reach.py
    token_dim = 0  # of what its layers make of tokens
    runs_compiled = True  # now, what is compiled of its layers

    def vocabulary_modules(self) -> list[nn.Module]:
        """The input embeddings and the head, whose tensors have a row for each entry of the vocabulary."""
        raise NotImplementedError

    @property
    def term_weights(self) -> dict[str, float]:
        """Terms that a model adds to those of an objective, and what they weigh if --loss_weights says nothing."""
        return {}

    def supervised_states(self, batch: dict) -> tuple[Tensor, Head]:
        """States (S, hidden) at the supervised positions of a batch, and what makes logits (S, V) of them."""
        raise NotImplementedError

    def token_wise_parts(self) -> Iterator[tuple[nn.Module, str]]:
        """Methods that make of tokens as many tokens and let none see another, layer by layer: module and name."""
        raise NotImplementedError

    def input_embeddings(self) -> nn.Module:
        """The module that looks tokens up: ids (..., T) -> (..., T, hidden)."""
        raise NotImplementedError
