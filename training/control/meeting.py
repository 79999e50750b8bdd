"""How processes that may have been started many times find those of the same start, in a store that remembers all.

torchrun keeps one store while it starts the processes of a job again and again, and each node counts the starts for
itself: neither the count nor what stands in the store tells a start from an earlier one. Each process therefore draws a
word of its own; rank 0 answers every word that it sees with its own, and who finds the answer to its word knows that
both are of now.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Protocol

logger = logging.getLogger("train")

POLL_SECONDS = 0.05
SLOW_SECONDS = 60.0


class KeyValueStore(Protocol):
    """What is needed of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def meet(store: KeyValueStore, rank: int, world_size: int) -> str:
    """A name that this start of the job alone has; returns on every rank when all of them are there.

    There is no time limit: some may still prepare their data, and where one dies torchrun ends the others.
    """
    own, slow = uuid.uuid4().hex, time.monotonic() + SLOW_SECONDS

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def wait(missing: int) -> None:
        nonlocal slow
        if time.monotonic() > slow:
            slow += SLOW_SECONDS
            logger.info("waiting for %d processes, which may still prepare their data", missing)
        time.sleep(POLL_SECONDS)

    if rank == 0:
        answered = {other: "" for other in range(1, world_size)}
        while missing := sum(read(f"ready {other}") != own for other in answered):
            for other, before in answered.items():
                word = read(f"word {other}")
                if word != before:
                    store.set(f"answer {other}", f"{word} {own}")
                    answered[other] = word
            wait(missing)
        store.set(f"all {own}", "ready")
        return own

    store.set(f"word {rank}", own)
    while not (answer := read(f"answer {rank}")).startswith(own):
        wait(world_size - 1)
    name = answer.removeprefix(f"{own} ")
    store.set(f"ready {rank}", name)
    while not store.check([f"all {name}"]):
        wait(world_size - 1)
    return name
