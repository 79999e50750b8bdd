"""Processes as torchrun would start them, forked from a server that has imported the trainer once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Two processes start in a fraction of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_full_sft", "torch._dynamo", "peft"])  # the others are imported late, in seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(target: Callable[..., None], world_size: int, args: tuple, timeout_seconds: float = 120) -> list[int]:
    """Exit codes of `target(rank, *args)` in one process per rank, each with the environment that torchrun sets.

    When a rank dies the others are ended, as torchrun would; so are all at the time limit, their stacks to stderr.
    """
    port, environment = free_port(), dict(os.environ)  # the server of forks has the one of its own start
    workers = [
        FORKS.Process(target=_be_rank, args=(rank, world_size, port, environment, target, args))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + timeout_seconds
    while any(worker.is_alive() for worker in workers):
        late = time.monotonic() > deadline
        if late or any(worker.exitcode not in (None, 0) for worker in workers):
            for worker in workers:
                if late and worker.is_alive():
                    os.kill(worker.pid, signal.SIGABRT)
                worker.join(timeout=3)
                worker.kill()
        workers[0].join(timeout=0.02)
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _be_rank(
    rank: int, world_size: int, port: int, environment: dict[str, str], target: Callable[..., None], args: tuple
) -> None:
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false")
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    target(rank, *args)


def train_rank(rank: int, values: dict, save_dir: str, wrap_objective: Callable | None) -> None:
    """What the command line would do, with all that is printed in a file."""
    descriptor = os.open(f"{save_dir}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import train_full_sft
    from model.losses import make_sft_objective
    from training.config import make_config

    if wrap_objective:
        objective = wrap_objective(make_sft_objective(), rank)
        original = train_full_sft.run
        train_full_sft.run = lambda config: original(config, objective)  # type: ignore[misc]
    code = train_full_sft.main(make_config(values))
    if values.get("strategy") == "fsdp":  # gloo's teardown after FSDP2 now and then aborts
        train_full_sft.end_process(code)
    sys.exit(code)


def resume_from(whole: Path, step: int, copy: Path) -> Path:
    """A run directory as a crash right after the checkpoint of `step` would have left it."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "final")
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy
