"""--dry_run: what a run would read, train and need."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader

from dataset.loader import fetch_windows
from trainer_utils import close_processes
from training.device import peak_memory_bytes
from training.run.learner import Learner
from training.schedule.plan import Plan
from training.schedule.train_state import LoopState
from training.text import duration

logger = logging.getLogger("train")


def rehearse(
    learner: Learner, loader: DataLoader[Any], micro_batches: int, plan: Plan, sample: str, ledger: Iterable[str],
    train_step: Callable[..., Any],
) -> dict[str, Any]:  # fmt: skip
    """--dry_run: show a sample and the ledger, and train two steps that nobody keeps to tell what a run will need."""
    logger.info("\nthe first sample, supervised tokens in colour:\n%s\n\n%s", sample, "\n".join(ledger))
    processes, seconds = learner.processes, math.nan
    for step, (window, problem) in enumerate(itertools.islice(fetch_windows(loader, micro_batches), 2), start=1):
        if problem:
            raise problem
        (supervised,) = processes.sum_ints([sum(len(batch["targets"]) for batch in window)])
        started = time.perf_counter()
        train_step(learner, window, step, 0.0, plan.loss_weights(step), supervised, LoopState())
        seconds = time.perf_counter() - started
    logger.info(
        "\n%d epochs, the first of %d steps, %d steps in all (of %d rows, %d micro-batches per rank, in the first "
        "stage), about %.2f s each: %s in all; "
        "peak memory so far %.2f GiB per process. Nothing was saved.",
        plan.epochs, plan.steps_of(0), plan.total_steps, plan.window_rows(0), micro_batches, seconds,
        duration(seconds * plan.total_steps), peak_memory_bytes(processes.device) / 2**30,
    )  # fmt: skip
    close_processes(processes)
    return {"status": "completed", "step": 0}
