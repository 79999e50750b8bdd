"""Optimizers of torch.optim with their parameter groups; no optimizer code of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of --optimizer for a model that has `shard_units()`, its layers.

    Decay pulls on matrices only, since shrinking a norm's gain changes what it means. adamw, adafactor and muon take
    lr x decay x weight off the weight; in adam and sgd it is an L2 penalty, decay x weight added to the gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        return _muon(model, parameters, config)
    return _by_name(config.optimizer, parameters, config)


def _by_name(name: str, parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr, betas = config.learning_rate, (config.adam_beta1, config.adam_beta2)
    adam: dict[str, Any] = {"betas": betas, "eps": config.adam_eps, "amsgrad": config.amsgrad, "fused": True}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **adam)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, **adam)
    if name == "sgd":  # its fused kernel knows no sharded tensors
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    assert name == "adafactor", name
    # Its learning rate is a share of the size of each tensor (root mean square, at least 1e-3), at most 1 / sqrt(step).
    return torch.optim.Adafactor(groups, lr=lr)


def _muon(model: nn.Module, parameters: Sequence[nn.Parameter], config: Config) -> Several:
    """Muon (Jordan et al. 2024) for the matrices of the layers; AdamW for embeddings, head and vectors.

    Muon's update is scaled by 0.2 sqrt(max(rows, columns)), which makes it as large as one of AdamW (Liu et al. 2025):
    one learning rate and one decay serve both. Its steps towards orthogonality compute in bfloat16, so the last bit of
    a gradient shows in the fourth digit of the update. Raises ValueError where the layers hold no matrix.
    """
    of_layers = {p for unit in model.shard_units() for p in unit.parameters()}  # type: ignore[operator]
    matrices = [p for p in parameters if p in of_layers and p.dim() == 2]
    if not matrices:
        raise ValueError("--optimizer muon: the layers of this model hold no matrices, use --optimizer adamw")
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    chosen = set(matrices)
    return Several([muon, _by_name("adamw", [p for p in parameters if p not in chosen], config)])


class Several(torch.optim.Optimizer):
    """Optimizers as one: its groups are theirs, and they keep their state in its own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
