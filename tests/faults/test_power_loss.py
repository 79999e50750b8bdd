"""The power goes at any moment of a run of saves: whatever the disk holds then, what was published can be loaded."""

import random
import re
import shutil

import pytest

from tests.faults.disks import Disk, signature, write_tree
from tests.faults.savers import assert_is_whole, publish, save_in_turn
from tests.faults.strace import Child, read_log, straced
from training.checkpoints.manifest import CheckpointError
from training.checkpoints.store import CheckpointStore

SEED = 20


def log_of_saves(save_dir, log, ranks, steps):
    children = [Child(save_in_turn, str(save_dir / "checkpoints"), rank, ranks, steps) for rank in range(ranks)]
    with straced(children, log, "-s", "100000"):
        for child in children:
            child.go()
        for child in children:
            child.process.join()
    assert children[0].heard() == steps
    return read_log(log)


def disks_that_lose(save_dir, before, calls, disk, scratch, steps, draws, stride=1):
    """(possible disks, what is wrong with the bad ones), whenever the power goes in a run that saves `steps`."""
    rng, seen, bad, changes = random.Random(SEED), set(), [], 0
    for call in calls:
        changed, reported = disk.replay(call), disk.reported
        changes += changed
        if changed and changes % stride:
            continue
        published = [*before, *steps[:reported]]
        for tree in disk.possible(rng, draws):
            sign = signature(tree), reported
            if sign in seen:
                continue
            seen.add(sign)
            shutil.rmtree(scratch, ignore_errors=True)
            write_tree(tree, scratch)
            store = CheckpointStore(scratch / "checkpoints")
            try:
                newest = store.newest_verified(lambda message: None)
                assert (newest or 0) >= max(published, default=0), f"{newest} of {published}"
                if newest is not None:
                    assert_is_whole(store.path(newest), newest)
            except (AssertionError, CheckpointError) as error:
                bad.append(f"after {call}: {error}")
    return len(seen), bad


def lose_power(tmp_path, ranks, before, steps, draws, stride=1, forget=None):
    """As `disks_that_lose`; calls that `forget` finds in the log count as never made."""
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    for step in before:
        publish(CheckpointStore(save_dir / "checkpoints", keep_last=2), step, ranks)
    disk = Disk(save_dir)
    calls = log_of_saves(save_dir, tmp_path / "log", ranks, steps)
    calls = [call for call in calls if not (forget and call.name == "fsync" and re.search(forget, call.arguments))]
    count, bad = disks_that_lose(save_dir, before, calls, disk, tmp_path / "disk", steps, draws, stride)
    print(f"{count} disks of {ranks} ranks, {len(bad)} lose a checkpoint, seed {SEED}")
    return count, bad


@pytest.mark.parametrize(("ranks", "before", "steps"), [(1, [1, 2], [3, 4]), (2, [], [1])])
def test_no_loss_of_power_loses_a_published_checkpoint(tmp_path, strace, ranks, before, steps):
    count, bad = lose_power(tmp_path, ranks, before, steps, draws=2, stride=3)
    assert count >= 30 and not bad, bad  # how the ranks take turns decides the number


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("before", [[], [1, 2]])
def test_the_same_after_every_single_call(tmp_path, strace, ranks, before):
    count, bad = lose_power(tmp_path, ranks, before, [3, 4, 5], draws=40)
    assert count > 300 and not bad, bad


@pytest.mark.parametrize("forget", [r"\.(json|safetensors|draft)>", r"step-\d+>", "checkpoints>"])
def test_an_fsync_that_is_left_out_would_be_noticed(tmp_path, strace, forget):
    """Negative control: of the files, of the directory that holds them, of the one that gives it its name."""
    _, bad = lose_power(tmp_path, 1, [1, 2], [3], draws=2, stride=2, forget=forget)
    assert bad
