"""Processes of one start find each other in a store full of what earlier starts have left."""

import threading
import time

import pytest
from torch.distributed import HashStore

from training.control import meeting
from training.control.meeting import meet


def gather(store, world_size, late=None):
    """The names that each rank of one start was given; `late` is a rank that comes after the others."""
    names = {}

    def member(rank):
        if rank == late:
            time.sleep(0.3)
        names[rank] = meet(store, rank, world_size)

    threads = [threading.Thread(target=member, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(names) == list(range(world_size))
    return set(names.values())


@pytest.mark.parametrize("late", range(3))
def test_every_start_gets_one_name_of_its_own_whoever_comes_last(late):
    store, seen = HashStore(), set()
    for world_size in (3, 3, 2, 3):
        names = gather(store, world_size, late)
        assert len(names) == 1 and not names & seen
        seen |= names


def test_a_start_that_was_cut_short_leaves_nothing_that_misleads_the_next():
    store = HashStore()
    for key in ("word 1", "answer 1", "ready 1"):
        store.set(key, "of a process that died")
    assert len(gather(store, 2)) == 1


def test_who_waits_long_says_so(monkeypatch, caplog):
    monkeypatch.setattr(meeting, "SLOW_SECONDS", 0.1)
    caplog.set_level("INFO")
    gather(HashStore(), 2, late=1)
    assert "waiting for 1 processes" in caplog.text
