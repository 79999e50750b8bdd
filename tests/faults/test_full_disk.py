"""Disks that are full, broken or read-only: the old checkpoints stand, the run goes on, and says what it needs."""

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.faults.savers import train_a_little
from tests.faults.strace import Child, points_of, read_log, straced
from tests.small_world import log_of, result_of, train, write_rows
from training.checkpoints import CheckpointStore
from training.metrics import MetricsLog

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES")


class Training:
    """A forked process that trains and saves step by step."""

    def __init__(self, directory, in_background):
        self.store, self.child = (
            CheckpointStore(directory, keep_last=2),
            Child(train_a_little, str(directory), in_background),
        )

    def step(self):
        self.child.go()
        return self.child.connection.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.end()


def assert_names_place_and_bytes(messages, directory):
    """What a user has to know: where, how much is needed, how much is free."""
    (message,) = messages
    assert re.search(rf"{directory}\S*: [\d,]+ bytes needed, [\d,]+ free", message), message


def save_with_an_error(directory, log, point, error, in_background=False):
    """Steps 1 to 3 are saved, the save of step 4 meets an error, and step 5 is a try on a disk that works again."""
    shutil.rmtree(directory, ignore_errors=True)
    case = (point, error, in_background)
    options = ["-e", f"inject={point[0]}:error={error}:when={point[1]}"] if point else []
    with Training(directory, in_background) as training:
        for _ in range(3):
            training.step()
        with straced([training.child], log, *options):
            answer = training.step()
        newest = training.store.newest_verified(pytest.fail)
        assert newest in (3, 4), case
        after = training.step()
        heard = answer["said"] + after["said"]
        if in_background:
            after = training.step()  # which is where the end of the save before is seen
        if newest == 3:
            assert_names_place_and_bytes(heard, directory)
        assert after["failures"] == 0 and after["saved"] == 5, (case, answer, after)
        assert training.store.newest_verified(pytest.fail) >= 5, case
    left = [name for name in os.listdir(directory) if not name.startswith("step-")]
    assert not left, (case, left)
    return newest == 3


def fail_everywhere(tmp_path, errors_of, in_background=False):
    """Try the errors that `errors_of(number of the point)` gives at each point; returns (cases, saves that failed)."""
    directory, log = tmp_path / "run" / "checkpoints", tmp_path / "log"
    save_with_an_error(directory, log, None, None, in_background)
    points, failed, cases = points_of(read_log(log)), 0, 0
    for number, point in enumerate(points):
        for error in errors_of(number):
            failed += save_with_an_error(directory, log, point, error, in_background)
            assert "(INJECTED)" in log.read_text(), point
            cases += 1
    print(f"{cases} errors at {len(points)} points, {failed} saves failed and were made up for")
    return cases, failed


def test_a_save_that_fails_leaves_the_old_ones_and_is_tried_again(tmp_path, strace):
    """Each call meets one kind of error here."""
    cases, failed = fail_everywhere(tmp_path, lambda number: [ERRORS[number % len(ERRORS)]])
    assert cases > 25 and failed > 20


def test_a_save_that_fails_in_the_background_is_heard_of_in_the_next_step(tmp_path, strace):
    cases, failed = fail_everywhere(
        tmp_path, lambda number: [ERRORS[number % len(ERRORS)]] if number % 4 == 0 else [], in_background=True
    )
    assert cases > 5 and failed > 4


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_the_same_for_every_error_at_every_call(tmp_path, strace, in_background):
    cases, failed = fail_everywhere(tmp_path, lambda number: ERRORS, in_background)
    assert cases > 125 and failed > 100


@pytest.mark.parametrize("in_background", [False, True])
def test_three_saves_that_fail_in_a_row_end_the_run(tmp_path, strace, in_background):
    directory = tmp_path / "run" / "checkpoints"
    with Training(directory, in_background) as training:
        training.step()
        with straced([training.child], tmp_path / "log", "-e", "inject=fsync:error=EIO"):
            answers = [training.step()]
            while "gave_up" not in answers[-1]:
                answers.append(training.step())
        assert [answer["failures"] for answer in answers[:-1]] == ([0, 1, 2] if in_background else [1, 2])
        assert "the 3rd time in a row" in answers[-1]["gave_up"]
        assert_names_place_and_bytes([answers[-1]["gave_up"]], directory)
        assert training.store.newest_verified(pytest.fail) == 1
