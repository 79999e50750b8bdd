"""How many rows a micro-batch may have: as many as memory holds, found by trying before the first step."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn

from dataset.load import RunData
from dataset.rows import collate, longest_row
from model.losses import loss_of
from trainer_utils import unwrap
from training.config import Config
from training.config.flags import AUTO
from training.config.stages import Stage
from training.device import to_device
from training.diagnosis.machine import MOST_ROWS, state_bytes, trained_bytes
from training.run.learner import Learner

logger = logging.getLogger("train")

SPARE = 16  # a sixteenth of what is free stays free: memory in pieces holds less than memory in one


def wants_fit(config: Config, stages: Sequence[Stage]) -> bool:
    return any(each.batch_size == AUTO for each in (config, *(stage.config for stage in stages)))


def settle(config: Config, stages: Sequence[Stage], rows: int) -> tuple[Config, list[Stage]]:
    """Both with the number that was found wherever auto stood; a stage with a number of its own keeps it."""
    logger.info("--batch_size auto: %d rows per process and micro-batch", rows)

    def settled(each: Config) -> Config:
        return replace(each, batch_size=rows) if each.batch_size == AUTO else each

    return settled(config), [replace(stage, config=settled(stage.config)) for stage in stages]


def most_rows(stages: Sequence[Stage], rows_of_an_epoch: int, world_size: int) -> int:
    """Rows of a micro-batch beyond which none would be larger."""
    wanted = max(stage.config.global_batch_size or rows_of_an_epoch for stage in stages)
    return max(1, min(MOST_ROWS, -(-wanted // world_size)))


def rows_that_fit(
    loss_of_rows: Callable[[int], Tensor], model: nn.Module, most: int, config: Config, device: torch.device
) -> int:
    """The first of most, most / 2, most / 4 ... rows whose loss and its gradient do not run out of memory.

    Room is kept for what the optimizer has yet to allocate. Raises ValueError where not even one row fits.
    """
    from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    later = state_bytes(config, trained) - trained_bytes(config) * trained
    rows = most

    def halve() -> int:
        nonlocal rows
        rows //= 2
        return rows

    def attempt(rows: int) -> int:
        try:
            loss_of_rows(rows).backward()  # type: ignore[no-untyped-call]
        finally:
            model.zero_grad(set_to_none=True)
        return rows

    @find_executable_batch_size(starting_batch_size=most, reduce_batch_size_fn=halve)  # type: ignore[untyped-decorator]
    def search(rows: int) -> int:
        with _tight(later, device):
            return attempt(rows)

    try:
        attempt(1)  # builds what is built once: threads, kernels
        return int(search())
    except RuntimeError as error:
        if "No executable batch size" not in str(error) and not should_reduce_batch_size(error):
            raise
    raise ValueError(
        "--batch_size auto: not even one row fits in memory; set --gradient_checkpointing 1, lower --max_seq_len, or "
        "take --param_dtype bfloat16"
    )


@contextlib.contextmanager
def _tight(later_bytes: int, device: torch.device) -> Iterator[None]:
    """Memory as it will be: less what comes later and a spare part.

    A CPU's system would sooner kill a process than refuse it memory, so there each process is given a limit, its share
    of what is free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room = torch.empty(later_bytes + free // SPARE, dtype=torch.uint8, device=device)
        try:
            yield
        finally:
            del room
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    held = psutil.Process().memory_info().vms
    limit = held + max(0, free - free // SPARE - later_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def find_rows(learner: Learner, config: Config, stages: list[Stage], data: RunData) -> int:
    """The rows of a micro-batch for which a forward and a backward pass find memory on every rank."""
    processes, model = learner.processes, unwrap(learner.model)  # nothing is exchanged: each rank tries by itself
    longest = longest_row(max(stage.config.max_seq_len for stage in stages), int(data.train.store.lengths.max()))

    def loss_of_rows(rows: int) -> Tensor:
        with learner.autocast():
            return loss_of(learner.objective(model, to_device(collate([longest] * rows), processes.device)), {})

    most = most_rows(stages, data.train.rows_of(0), processes.world_size)
    return processes.least(rows_that_fit(loss_of_rows, model, most, config, processes.device))
