"""kill -9 at every call by which a save changes files: what was published stays, and the next save works."""

import os

import pytest

from tests.faults.savers import assert_is_whole, copy_fresh, publish, save_in_turn
from tests.faults.strace import Child, points_of, read_log, straced
from training.checkpoints.store import CheckpointStore


def run_and_kill(directory, log, ranks, victim, steps, point=None):
    """Steps that rank 0 said were published, when the victim is killed at a point and then all, as torchrun does."""
    options = ["-e", f"inject={point[0]}:signal=KILL:when={point[1]}"] if point else []
    children = [Child(save_in_turn, str(directory), rank, ranks, steps) for rank in range(ranks)]
    try:
        with straced([children[victim]], log, *options):
            for child in children:
                child.go()
            children[victim].process.join()
        if point is None:
            for child in children:
                child.process.join()
            assert {child.process.exitcode for child in children} == {0}
        for child in children:
            child.process.kill()
        return children[0].heard()
    finally:
        for child in children:
            child.end()


def assert_recovers(directory, published, point):
    store, said = CheckpointStore(directory, keep_last=2), []
    newest = store.newest_verified(said.append)
    assert not said, (point, said)
    assert (newest or 0) >= max(published, default=0), (point, newest)  # it may stand although nobody was told
    if newest is not None:
        assert_is_whole(store.path(newest), newest)
    publish(store, 99)
    assert store.newest_verified(pytest.fail) == 99, point
    assert_is_whole(store.path(99), 99)
    names = sorted(os.listdir(directory))
    assert names == sorted(store.path(step).name for step in store.steps()) and len(names) <= 2, (point, names)


@pytest.fixture
def two_saved(tmp_path):
    """A directory in which checkpoints 1 and 2 stand, so that each further save deletes one."""
    for step in (1, 2):
        publish(CheckpointStore(tmp_path / "two", keep_last=2), step, ranks=2)
    return tmp_path / "two"


def kill_everywhere(tmp_path, start, ranks, victim, steps, stride=1):
    """Kill at every point, or at every stride-th one; returns how many that were."""
    directory, log = tmp_path / "run" / "checkpoints", tmp_path / "log"
    before = CheckpointStore(start).steps()

    def begin():
        copy_fresh(start, directory) if before else copy_fresh(start.parent / "empty", directory.parent)

    (start.parent / "empty").mkdir(exist_ok=True)
    begin()
    assert run_and_kill(directory, log, ranks, victim, steps) == steps
    points = points_of(read_log(log))[::stride]
    for point in points:
        begin()
        published = run_and_kill(directory, log, ranks, victim, steps, point)
        assert "killed by SIGKILL" in log.read_text(), point
        assert_recovers(directory, before + published, point)
    print(f"{len(points)} crash points of rank {victim} of {ranks}")
    return len(points)


@pytest.mark.parametrize(("ranks", "victim", "stride"), [(1, 0, 3), (2, 0, 5), (2, 1, 3)])
def test_a_save_killed_at_any_point_loses_nothing_that_was_published(
    tmp_path, strace, two_saved, ranks, victim, stride
):
    assert kill_everywhere(tmp_path, two_saved, ranks, victim, [3, 4], stride) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_the_same_at_every_single_point(tmp_path, strace, two_saved, ranks, victim):
    assert kill_everywhere(tmp_path, two_saved, ranks, victim, [3, 4]) >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_run_killed_in_its_first_save_starts_again_from_nothing_or_from_that(tmp_path, strace, ranks, victim):
    assert kill_everywhere(tmp_path, tmp_path / "none", ranks, victim, [1]) >= 10
