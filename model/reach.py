"""Which parameters text reaches: what sees and hears in a model of several senses is frozen, and so are unused heads.

What lies outside the text part of a model of transformers is known from its structure, also while it has no memory.
The rest is found where the model is tried: what the logits of a text come from is in their graph. DDP would wait for
the gradients of all others, and adapters beside them would learn nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def reached_by(logits: Tensor) -> set[int]:
    """The ids of the parameters that logits come from; no gradient is computed for it."""
    found, seen, nodes = set(), set(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [each for each, _ in node.next_functions]
    return found


def freeze_unreached(model: Any, reached: set[int] | None = None) -> None:
    """Freeze what text does not reach; `reached`: what it did when the model, an HFCausalLM, was tried.

    Experts are reached by the tokens that are sent to them, which a short trial does not show.
    """
    text = _text_part(model.inner)
    for name, parameter in model.named_parameters():
        untouched = reached is not None and id(parameter) not in reached and ".experts." not in f".{name}"
        if untouched or text is not None and id(parameter) not in text:
            parameter.requires_grad_(False)
            model.unreached.append(name)


def _text_part(inner: Any) -> set[int] | None:
    """The ids of the parameters of the text part, None where a model is nothing else."""
    if inner.config.get_text_config() is inner.config:
        return None
    parts = inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings()
    return {id(parameter) for part in parts for parameter in part.parameters()}


def outermost(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """The parameters with these names, or in their place the largest modules that hold no others."""
    names, found = set(names), []
    others = [name for name, _ in model.named_parameters() if name not in names]
    for name, _ in model.named_parameters():
        if name in names and not any(name.startswith(f"{each}.") for each in found):
            path, *rest = name.split(".")
            while any(f"{other}.".startswith(f"{path}.") for other in others):
                path = f"{path}.{rest.pop(0)}"
            found.append(path)
    return found
