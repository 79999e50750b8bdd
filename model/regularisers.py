"""What an objective may do at the input embeddings of a model: add noise while it trains, and weigh how steep it is."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.language_model import LanguageModel, Objective
from model.norm import RMSNorm


def on_embeddings(objective: Objective, neftune_alpha: float, gradient_penalty: bool) -> Objective:
    """The objective with what is asked for; itself where that is nothing. Raises ValueError."""
    if not 0.0 <= neftune_alpha < float("inf"):
        raise ValueError(f"neftune_alpha must be a number from 0, got {neftune_alpha}")
    objective = with_noise(objective, neftune_alpha) if neftune_alpha else objective
    return with_gradient_penalty(objective) if gradient_penalty else objective


def with_noise(objective: Objective, alpha: float) -> Objective:
    """NEFTune (Jain et al. 2023): while a model trains, uniform(-1, 1) x alpha / sqrt(L x hidden) on its embeddings.

    L is the length of the token's own document, so packing changes no size of noise. It is drawn from torch's default
    generator.
    """

    def noisy(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        if not model.training:
            return objective(model, batch)
        lengths = batch["cu_seqlens"].diff()
        own_lengths = lengths.repeat_interleave(lengths, output_size=len(batch["input_ids"]))

        def add_noise(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
            bound = alpha * (own_lengths.to(embedded.dtype) * embedded.shape[-1]).rsqrt()
            return embedded + torch.empty_like(embedded).uniform_(-1.0, 1.0) * bound[:, None]

        with embeddings_of(model).register_forward_hook(add_noise):
            return objective(model, batch)

    return noisy


def with_gradient_penalty(objective: Objective) -> Objective:
    """Adds "gp", the sum over all input positions t of |d ce / d embedding_t|^2, where gradients are recorded.

    "ce" is itself a sum over tokens, and no document sees another, so "gp" adds up over documents as "ce" does.
    Raises ValueError for a model that cannot be differentiated twice.
    """

    def penalised(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return objective(model, batch)
        embedded: list[Tensor] = []
        with (
            embeddings_of(model).register_forward_hook(lambda *call: embedded.append(call[2].requires_grad_())),
            twice_differentiable(model),
        ):
            terms = objective(model, batch)
        with torch.autocast(terms["ce"].device.type, enabled=False):  # it is for forward passes only
            gradients = torch.autograd.grad(terms["ce"], embedded, create_graph=True)
        return {**terms, "gp": torch.stack([gradient.square().sum() for gradient in gradients]).sum()}

    return penalised


def embeddings_of(model: nn.Module) -> nn.Module:
    """The input embeddings of a model that may be wrapped."""
    return next(each for each in model.modules() if isinstance(each, LanguageModel)).input_embeddings()


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """What runs forward in this block has a second derivative: plain attention and norms, no fused ones.

    Raises ValueError where there is none all the same.
    """
    flag = "--gradient_penalty differentiates twice"
    if any(isinstance(module.forward, partial) for module in model.modules()):  # see parts.recompute_in_backward
        raise ValueError(f"{flag}, which --gradient_checkpointing does not allow: choose one")
    if any(type(parameter.data) is not Tensor for parameter in model.parameters()):  # torch ends with a crash
        raise ValueError(f"{flag}, which --strategy fsdp does not allow: use --strategy ddp")
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.enter_context(norm.register_forward_hook(_plain_norm))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _plain_norm(norm: RMSNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The norm in plain operations; its own gradient is written by hand and has none in turn."""
    x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
    return (x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight).to(output.dtype)
