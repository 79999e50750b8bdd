"""An exponential moving average of the weights, of what each process holds of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

LocalPart = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]


class Ema:
    """average <- d average + (1 - d) weights after each update, with d = min(decay, (1 + n) / (10 + n)) after n steps.

    The second bound lets the first steps count although they are few (as in TensorFlow's ExponentialMovingAverage).
    The average is in float32 at least: a thousandth of a difference would be lost on a weight in bfloat16.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float, local_part: LocalPart,
        steps_done: Callable[[], int], settle: Callable[[], None],
    ):  # fmt: skip
        """`steps_done()`: before the update; `settle()` is called before weights change behind the model's back."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in trained.items()
        }
        self._decay, self._steps_done, self._settle = decay, steps_done, settle
        self._averages = [local_part(tensor)[0] for tensor in self.weights.values()]
        self._parameters = [local_part(parameter)[0] for parameter in trained.values()]
        optimizer.register_step_post_hook(lambda *_: self._update())  # skipped steps leave it alone

    @torch.no_grad()
    def _update(self) -> None:
        done = self._steps_done()
        decay = min(self._decay, (1 + done) / (10 + done))
        pairs = zip(self._averages, self._parameters, strict=True)
        wide = [parameter.to(average.dtype) for average, parameter in pairs]
        torch._foreach_lerp_(self._averages, wide, 1.0 - decay)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        self._settle()
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average in this block, and its own weights again after it."""
        own = [parameter.clone() for parameter in self._parameters]
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)
