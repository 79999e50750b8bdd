"""What forked processes do in these tests: save small checkpoints whose every value tells the step that it is of.

Every child imports this file, so it asks for nothing but what the trainer has loaded already.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from training.checkpoints.checkpointer import open_shards
from training.checkpoints.store import CheckpointStore

ROWS, COLUMNS = 96, 32


def weight_of(step: int) -> torch.Tensor:
    return torch.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS) * step


def shards_of(step: int, rank: int = 0, ranks: int = 1) -> dict[str, dict[str, Any]]:
    """This rank's rows of a weight and of its moment, and on the first rank a count, which has no dimension."""
    rows = ROWS // ranks
    mine = slice(rank * rows, (rank + 1) * rows)
    moment = {"weight:moment": (-weight_of(step)[mine], (rank * rows, 0), (ROWS, COLUMNS))}
    count = {"weight:step": (torch.tensor(float(step)), (), ())} if rank == 0 else {}
    return {
        "model": {"weight": (weight_of(step)[mine], (rank * rows, 0), (ROWS, COLUMNS))},
        "optimizer": moment | count,
    }


def publish(store: CheckpointStore, step: int, ranks: int = 1, **metrics: float) -> Path:
    store.begin(step)
    for rank in range(ranks):
        store.write_part(step, rank, ranks, shards_of(step, rank, ranks), {"step": step} if rank == 0 else None)
    return store.publish(step, ranks, metrics)


def assert_is_whole(checkpoint: Path, step: int) -> None:
    """The checkpoint holds what the step has saved, to the bit."""
    assert torch.equal(open_shards(checkpoint, "model").whole("weight"), weight_of(step))
    moments = open_shards(checkpoint, "optimizer")
    assert torch.equal(moments.whole("weight:moment"), -weight_of(step))
    assert moments.whole("weight:step").item() == step


def run_when_told(connection: Any, target: Callable[..., None], args: tuple) -> None:
    """Run `target(connection, *args)` once the parent has said so, when strace is there."""
    connection.send("ready")
    connection.recv()
    target(connection, *args)


def save_in_turn(connection: Any, directory: str, rank: int, ranks: int, steps: list[int]) -> None:
    """Save the steps one after the other as one of the ranks; rank 0 tells each that is published."""
    store = CheckpointStore(Path(directory), keep_last=2)
    for step in steps:
        if rank == 0:
            store.begin(step)
        while not store.temporary(step).is_dir():
            time.sleep(0.001)
        store.write_part(step, rank, ranks, shards_of(step, rank, ranks), {"step": step} if rank == 0 else None)
        if rank == 0:
            while not store.is_written(step, ranks):
                time.sleep(0.001)
            store.publish(step, ranks)
            connection.send(step)
        while not store.path(step).is_dir():
            time.sleep(0.001)


def tell(connection: Any, answer: Any) -> None:
    try:
        connection.send(answer)
    except OSError:  # an error that was meant for the first write to a file
        connection.send(answer)


def train_a_little(connection: Any, directory: str, in_background: bool) -> None:
    """One step with a save for each message, answered by where the saving stands; ends when saving gives up."""
    from trainer_utils import Processes
    from training.checkpoints.checkpointer import Checkpointer

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    model, state = torch.nn.Linear(8, 4), SimpleNamespace(step=0, to_dict=lambda sum_ints: {"step": state.step})
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Checkpointer(
        CheckpointStore(Path(directory), keep_last=2), model, optimizer, torch.amp.GradScaler("cpu", enabled=False),
        state, {}, Processes(0, 0, 1, torch.device("cpu")), report=lambda *_, **__: None, in_background=in_background,
    )  # fmt: skip
    while True:
        try:
            if saver.has_failed():
                saver.finish()
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            state.step += 1
            saver.save({})
            while in_background and saver.flight and not saver.flight.is_done():
                time.sleep(0.001)  # so that it fails within this step, and is heard of in the next
        except OSError as error:
            tell(connection, {"gave_up": str(error), "said": said})
            return
        tell(
            connection, {"step": state.step, "saved": saver.saved_step, "failures": saver.failures, "said": list(said)}
        )
        said.clear()
        connection.recv()


def copy_fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
