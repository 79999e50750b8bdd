"""Finding, loading and saving checkpoints on all ranks together: retries, and saves in the background."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer_utils import (
    SLOW_SECONDS,
    Processes,
    blocks_to_write,
    local_part,
    named_optimizer_state,
    named_weights,
    reshard,
)
from training.checkpoints.manifest import TRAINER_STATE, CheckpointError
from training.checkpoints.store import CheckpointStore
from training.checkpoints.tensor_files import ShardReader

logger = logging.getLogger("train")
LAST_TRIES_AFTER_SECONDS = (1, 5)


class Checkpointer:
    """Makes the checkpoints of one run, each with the loop's state and the run's constants, and none twice.

    Saving takes no long exchange between ranks, so that a slow disk is no hang: each rank writes its part, rank 0
    publishes when it sees all parts, and who waits asks again and again. One that fails is tried again at the next
    save; MAX_FAILURES in a row end the run.
    """

    MAX_FAILURES = 3

    def __init__(
        self,
        store: CheckpointStore,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        state: Any,
        constants: dict[str, Any],
        processes: Processes,
        report: Callable[..., None],
        in_background: bool = False,
        beat: Callable[[], None] = lambda: None,
        more: Mapping[str, Mapping[str, Tensor]] | None = None,
        is_saved: bool = False,
    ):
        """`state` has `step` and `to_dict(sum_ints)`; `report(step, event, **values)` hears of each checkpoint.

        `is_saved`: there is one of this step, or none is needed.
        """
        self.store, self.model, self.optimizer, self.scaler = store, model, optimizer, scaler
        self.state, self.constants, self.processes, self.report = state, constants, processes, report
        self.in_background, self.beat, self.more = in_background, beat, more or {}
        self.saved_step = state.step if is_saved else -1
        self.failures = 0
        self.flight: Any = None

    def save(self, metrics: Mapping[str, float], last: bool = False) -> None:
        """Every rank must call it. `metrics` of this step go into the manifest; `last`: nothing will be tried later.

        Raises OSError on all ranks when it has failed MAX_FAILURES times in a row.
        """
        self.finish()
        while self.state.step != self.saved_step:
            self._start(metrics)
            if last or not self.in_background:
                self.finish()
            if not last:
                return
            if self.failures:
                self._wait(LAST_TRIES_AFTER_SECONDS[self.failures - 1])

    def _start(self, metrics: Mapping[str, float]) -> None:
        step, processes = self.state.step, self.processes
        reshard(self.model)
        moving = {"loop": self.state.to_dict(processes.sum_ints), "scaler": self.scaler.state_dict()}
        tensors = {
            "model": named_weights(self.model), "optimizer": named_optimizer_state(self.model, self.optimizer),
            **self.more,
        }  # fmt: skip
        shards = {kind: blocks_to_write(named, processes, self.in_background) for kind, named in tensors.items()}
        blocks = [values for kind in shards.values() for values, _, _ in kind.values()]
        (needed,) = processes.sum_ints([sum(values.numel() * values.element_size() for values in blocks)])
        problem = None
        try:
            if processes.is_main:
                self.store.begin(step, needed)
        except OSError as error:
            problem = error
        if processes.any(problem is not None):
            self._failed(step, problem)
            return
        state = {**moving, **self.constants} if processes.is_main else None
        self.flight = self.store.write(step, processes.rank, processes.world_size, shards, state, metrics)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.beat()
            time.sleep(0.1)

    def has_failed(self) -> bool:
        """Whether this rank knows of a failure that the others may not know of yet; takes no exchange."""
        return self.flight is not None and self.flight.problem is not None

    def finish(self) -> None:
        """Wait for the checkpoint on its way, if any; every rank must call it. Raises as `save` does."""
        if self.flight is None:
            return
        slow = time.monotonic() + SLOW_SECONDS
        while True:
            done, failed = self.processes.sum_ints([self.flight.is_done(), self.flight.problem is not None])
            if failed or done == self.processes.world_size:
                break
            if time.monotonic() > slow:
                slow += SLOW_SECONDS
                logger.warning("still writing the checkpoint of step %d, %d processes are done", self.flight.step, done)
            self.beat()
            time.sleep(0.01)
        flight, self.flight = self.flight, None
        flight.end()
        if failed:
            self._failed(flight.step, flight.problem)
        else:
            self.saved_step, self.failures = flight.step, 0
            self.report(flight.step, "checkpoint", seconds=time.perf_counter() - flight.started)

    def _failed(self, step: int, problem: Exception | None) -> None:
        self.processes.sum_ints([0])  # nobody writes any more
        if self.processes.is_main:
            self.store.abandon(step)
        self.failures += 1
        reason = problem or "see the message of another rank"
        message = f"the checkpoint of step {step} could not be saved, older ones stand: {reason}"
        self.report(step, "checkpoint_failed", reason=str(reason))
        if self.failures >= self.MAX_FAILURES:
            raise OSError(f"{message}; {self.failures} times in a row")
        if problem is not None:
            logger.warning("%s; it is tried again, time %d of %d", message, self.failures, self.MAX_FAILURES)


def find_checkpoint(
    wanted: Path | None, store: CheckpointStore, verify: Callable[[Path], Any], processes: Processes
) -> Path | None:
    """The wanted checkpoint, else the newest good one, if there is one. Rank 0 verifies it for all."""
    newest: int | None = None
    problem: Exception | None = None

    def look() -> None:
        nonlocal newest, problem
        try:
            if wanted is None:
                newest = store.newest_verified(warn=logger.warning)
            else:
                verify(wanted)
        except Exception as error:  # the others wait to hear of it
            problem = error

    thread = threading.Thread(target=look, daemon=True)  # hashing may take longer than an exchange may wait
    if processes.is_main:
        thread.start()
    while processes.any(thread.is_alive()):
        time.sleep(0.02)
    step = processes.from_main(-1 if newest is None else newest)
    failed = processes.any(problem is not None)
    if failed:
        raise problem or OSError("rank 0 found no good checkpoint, see its message")
    return wanted or (store.path(step) if step >= 0 else None)


def read_tensors(reader: ShardReader, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or what this process holds of them, with what stands under their names."""
    for name, tensor in tensors.items():
        reader.read(name, *local_part(tensor))


def load_checkpoint(
    weights: ShardReader, moments: ShardReader, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put verified weights and optimizer state in place, whatever ranks and strategy they were saved by.

    Floats of another width are rounded to those of the model, which only a run does whose precision was to change.
    Raises ValueError where names, shapes or kinds of numbers do not fit.
    """
    own, floats = named_weights(model), (torch.float32, torch.bfloat16)
    kinds: dict[Any, Any] = {dtype: "float" for dtype in floats}
    expected = {name: (tuple(tensor.shape), kinds.get(tensor.dtype, tensor.dtype)) for name, tensor in own.items()}
    dtypes = {name: kinds.get(dtype, dtype) for name, dtype in weights.dtypes.items()}
    found = {name: (shape, dtypes[name]) for name, shape in weights.shapes.items()}
    parameters = dict(model.named_parameters())
    strangers = {name for name in moments.shapes if name.rpartition(":")[0] not in parameters}
    if wrong := sorted({name for name in {*expected, *found} if expected.get(name) != found.get(name)} | strangers):
        raise ValueError(
            f"the checkpoint does not fit this model, first difference: {wrong[0]} is {found.get(wrong[0])} in it and "
            f"{expected.get(wrong[0])} here"
        )
    read_tensors(weights, own)
    for full_name, shape in moments.shapes.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[name]
        # Beside what is shaped like its parameter, and sharded like it, an optimizer counts steps.
        alike = shape == tuple(parameter.shape)
        zeros = partial(torch.zeros_like, parameter, requires_grad=False) if alike else partial(torch.zeros, shape)
        is_same = weights.dtypes[name] == parameter.dtype
        value = zeros(dtype=moments.dtypes[full_name] if is_same or not alike else parameter.dtype)
        moments.read(full_name, *local_part(value))
        optimizer.state[parameter][key] = value if alike else value.to(parameter.device)


def has_shards(directory: Path, kind: str) -> bool:
    return any(directory.glob(f"{kind}-*-of-*.safetensors"))


def open_shards(directory: Path, kind: str) -> ShardReader:
    """The tensors of one kind, `model` or `optimizer`, in a verified checkpoint."""
    files = sorted(directory.glob(f"{kind}-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: holds no {kind} files")
    return ShardReader(files)


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """What a verified checkpoint says of the loop; CheckpointError where that is no JSON object, whoever hashed it."""
    try:
        state: Any = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / TRAINER_STATE}: no JSON ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{directory / TRAINER_STATE}: a JSON object is needed, not a {type(state).__name__}")
    return state


def weights_to_export(directory: Path, averaged: bool) -> dict[str, Tensor]:
    """The weights in a verified checkpoint, or their moving averages where it has some."""
    weights = open_shards(directory, "model").tensors()
    return {**weights, **(open_shards(directory, "ema").tensors() if averaged and has_shards(directory, "ema") else {})}
