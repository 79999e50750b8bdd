"""Whether a model of transformers keeps packed documents apart, found out by trying it instead of by a list of names.

Some families never call the attention that they are given, some carry state from token to token, some do more to the
scores than they say. What fails the trial computes its documents side by side, each in a line of its own, and is tried
again; what fails then too is no causal language model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.reach import reached_by

logger = logging.getLogger("train")

PROBE_TOKENS = (7, 5)  # of the two documents that a model is tried on
# How a model reads a batch: all documents in one line, each in a line of its own, or one document as its makers would.
PACKED, APART, PLAIN = "packed", "apart", "plain"
# Largest difference from the logits that a model gives a document alone with its own attention, as a share of the
# largest logit.
TOLERANCE, TOLERANCE_IN_HALF = 1e-3, 0.05


def check_isolation(model: Any, dtype: torch.dtype = torch.float32) -> set[int]:
    """Let the model pack if it can, else let it compute documents apart and say so; ValueError where neither is right.

    `model`: an HFCausalLM, which computes in `dtype`. Returns `reached_by` of its logits.
    """
    family, training = type(model.inner).__name__, model.training
    tolerance = TOLERANCE if dtype == torch.float32 else TOLERANCE_IN_HALF
    model.eval()
    reached: set[int] = set()
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(f"{family} is no causal language model: its config.json says use_bidirectional_attention")
    reason = _tried(model, tolerance, reached) if model.reading == PACKED else "it takes no attention but its own"
    if reason:
        model.read_apart()
        if fault := _tried(model, tolerance, reached):
            raise ValueError(f"{family} is no causal language model that this kit could train: {fault}")
        logger.warning(
            "%s cannot be packed: %s. The documents of a row are computed side by side, padded on the right, which is "
            "exact and slower", family, reason,
        )  # fmt: skip
    model.train(training)
    return reached


def _tried(model: Any, tolerance: float, reached: set[int]) -> str | None:
    """The fault of a model, which knows meanwhile that it is tried."""
    model.told = []
    try:
        return _fault(model, tolerance, model.told, reached)
    finally:
        model.told = None  # now: in the backward pass a layer may run once more


def _fault(model: Any, tolerance: float, told: list[int | None], reached: set[int]) -> str | None:
    """What is wrong with how the model reads two documents, None if nothing is; `reached` becomes what they reach.

    Influence is a gradient that is not exactly zero: equal logits would be too much to ask of a mixture, whose matrix
    products change their shape, and so their rounding.
    """
    numbers = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, model.vocab_size, (length,), generator=numbers) for length in PROBE_TOKENS)
    embedded: list[Tensor] = []
    # Frozen embeddings ask for no gradient themselves.
    hook = model.input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2].requires_grad_()))
    try:
        logits = _last_logits(model, [first, second])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"it fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    finally:
        hook.remove()
    if model.reading == PACKED and (fault := _fault_of_layers(model.config.get_text_config(), told)):
        return fault
    reached.clear()
    reached |= reached_by(logits)
    (influence,) = torch.autograd.grad(logits[:-1].square().sum(), embedded)
    if influence[0, : len(first)].any():
        return "one document changes the logits of another"
    if influence[0, -1].any():
        return "a token changes the logits of those before it"
    with torch.no_grad():
        with _as_its_makers_do(model):
            alone = _last_logits(model, [second])
        difference, size = (logits - alone).abs().max().item(), alone.abs().max().item()
        if not difference <= tolerance * size:  # also false for NaN
            return f"it computes other logits than alone ({difference:.2g} off)"
        model.use_plain_head(lambda: _last_logits(model, [first, second]))
    return None


def _fault_of_layers(config: Any, told: list[int | None]) -> str | None:
    """What config.json says of the layers and our attention was not told; the trial is too short for it to show."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windows = [bool(getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))]
        told = [max(told, key=bool, default=None)]
    elif other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return f"it has layers of {', '.join(other)}, which know of no documents"
    else:
        windows = [kind == "sliding_attention" for kind in kinds]
    return None if [*map(bool, told)] == windows else "its layers do not say which of them have a window"


@contextmanager
def _as_its_makers_do(model: Any) -> Iterator[None]:
    reading, model.reading = model.reading, PLAIN
    try:
        with its_own_attention(model):
            yield
    finally:
        model.reading = reading


@contextmanager
def its_own_attention(model: Any) -> Iterator[None]:
    """The attention that every family has, which understands caches and padding masks."""
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = model.attention


def _last_logits(model: nn.Module, documents: list[Tensor]) -> Tensor:
    """Logits (tokens, V) of the last of some documents in a row."""
    lengths, device = [len(document) for document in documents], next(model.parameters()).device
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
