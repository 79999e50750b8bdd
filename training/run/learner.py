"""What learns, and how: the parts that one update touches."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from model.language_model import Objective
from trainer_utils import Processes


@dataclass
class Learner:
    """What learns, and how: the parts that one update touches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    objective: Objective
    processes: Processes
    dtype: torch.dtype
    grad_clip: float
    seed: int
    measure: Objective  # what validation sums; the plain cross entropy, whatever is trained on
    beat: Callable[..., None] = lambda step_done=False: None  # tells the watchdog that this process gets on

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)
