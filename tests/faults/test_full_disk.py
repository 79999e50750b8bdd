"""Disks that are full, broken or read-only: the old checkpoints stand, the run goes on, and says what it needs."""

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.faults.savers import train_a_little
from tests.faults.strace import Child, points_of, read_log, straced
from tests.small_world import log_of, records_of, result_of, train, write_rows
from training.checkpoints.store import CheckpointStore
from training.records.metrics import MetricsLog

STEPS = 12  # so that the records outgrow the first 4 KiB of their file
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
    """Every other call meets one kind of error here, the long lane tries all."""
    cases, failed = fail_everywhere(tmp_path, lambda number: [ERRORS[number % len(ERRORS)]] if number % 2 == 0 else [])
    assert cases > 12 and failed > 8


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
        assert "3 times in a row" in answers[-1]["gave_up"]
        assert_names_place_and_bytes([answers[-1]["gave_up"]], directory)
        assert training.store.newest_verified(pytest.fail) == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mounts file systems of so many bytes: `small_disk(size)` is a directory."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Ballast:
    """Takes up a disk from the first training pass on until a later one."""

    def __init__(self, file, free_bytes, until_call, from_call=1):
        self.file, self.free_bytes, self.from_call, self.until_call = file, free_bytes, from_call, until_call

    def __call__(self, objective, rank):
        calls = 0

        def heavy(model, batch):
            nonlocal calls
            calls += model.training
            if calls == self.from_call and model.training:
                free = shutil.disk_usage(self.file.parent).free
                self.file.write_bytes(bytes(max(0, free - self.free_bytes)))
            if calls == self.until_call and model.training:
                self.file.unlink()
            return objective(model, batch)

        return heavy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on a disk with room, and the size of one of its checkpoints."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    flags = {"data_path": str(write_rows(run.parent / "rows.jsonl")), "max_steps": STEPS, "keep_last": 2}
    assert train(1, run, **flags) == [0], log_of(run)
    (newest,) = (run / "checkpoints").glob(f"step-{STEPS:08d}")
    return run, flags, sum(path.stat().st_size for path in newest.iterdir())


def failed_and_saved_steps(run):
    """Steps whose save has failed, and whose save has succeeded; every line of the records must be whole."""
    records = records_of(run)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1)), (
        "none is lost or twice there"
    )
    events = {
        kind: [r["step"] for r in records if r.get("event") == kind] for kind in ("checkpoint_failed", "checkpoint")
    }
    return events["checkpoint_failed"], events["checkpoint"]


def train_on_a_full_disk(disk, undisturbed, times, in_background):
    """There is room for `times` checkpoints, until after two saves have failed."""
    whole, flags, size = undisturbed
    fit = int(times)
    ballast = Ballast(disk / "ballast", int(times * size), until_call=fit + 3)
    flags = {**flags, "async_save": in_background, "cache_dir": str(whole.parent)}
    assert train(1, disk / "run", wrap_objective=ballast, **flags) == [0], log_of(disk / "run")
    failed, saved = failed_and_saved_steps(disk / "run")
    # In the background the second may still be under way when the ballast goes.
    assert failed == [fit + 1, fit + 2][: len(failed)] and len(failed) >= 2 - in_background, (failed, saved)
    assert saved == [step for step in range(1, STEPS + 1) if step not in failed], (failed, saved)
    log = log_of(disk / "run")
    assert len(re.findall(r"[\d,]+ bytes needed, [\d,]+ free; it is tried again, time \d of 3", log)) == len(failed), (
        log
    )
    assert result_of(disk / "run")["final"] == result_of(whole)["final"]
    assert CheckpointStore(disk / "run" / "checkpoints").newest_verified(pytest.fail) == STEPS
    print(f"room for {times} checkpoints: saves of steps {failed} failed")


@pytest.mark.parametrize(("times", "in_background"), [(0.3, True), (1.05, False), (2.5, False)])
def test_a_run_outlives_a_full_disk(small_disk, undisturbed, times, in_background):
    train_on_a_full_disk(small_disk(8 * undisturbed[2]), undisturbed, times, in_background)


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("times", [0.3, 0.6, 0.9, 0.99, 1.2, 1.5, 1.8, 2.1, 2.5])
def test_a_run_outlives_disks_of_all_sizes(small_disk, undisturbed, times, in_background):
    train_on_a_full_disk(small_disk(8 * undisturbed[2]), undisturbed, times, in_background)


def test_records_of_steps_on_a_disk_without_a_byte_left_are_all_there_afterwards(small_disk, undisturbed):
    whole, flags, size = undisturbed
    disk = small_disk(8 * size)
    flags = {**flags, "save_interval": "4", "cache_dir": str(whole.parent)}
    ballast = Ballast(disk / "ballast", 0, from_call=5, until_call=11)
    assert train(1, disk / "run", wrap_objective=ballast, **flags) == [0], log_of(disk / "run")
    assert failed_and_saved_steps(disk / "run") == ([8], [4, 12])
    assert "its records wait in memory" in log_of(disk / "run")
    assert result_of(disk / "run")["final"] == result_of(whole)["final"]


def test_a_disk_that_stays_full_ends_the_run_without_a_result_and_a_resume_finishes_it(small_disk, undisturbed):
    whole, flags, size = undisturbed
    disk = small_disk(8 * size)
    flags = {**flags, "cache_dir": str(whole.parent)}
    # First no checkpoint fits any more, from the one before the last on; then the checkpoints fit, but not the result.
    no_checkpoint = Ballast(disk / "ballast", 1000, from_call=STEPS - 1, until_call=99)
    no_result = Ballast(disk / "ballast", 2 * size + 60_000, from_call=1, until_call=99)
    for ballast, resume, newest, said in (
        (no_checkpoint, "0", STEPS - 2, "could not be saved"),
        (no_result, "1", STEPS, "run/final: "),
    ):
        flags["keep_last"] = 2 if resume == "0" else 9
        assert train(1, disk / "run", wrap_objective=ballast, from_resume=resume, **flags) == [74], log_of(disk / "run")
        assert said in log_of(disk / "run") and "bytes needed" in log_of(disk / "run")
        assert not (disk / "run" / "final").exists()
        assert CheckpointStore(disk / "run" / "checkpoints").newest_verified(pytest.fail) == newest
        (disk / "ballast").unlink()
    assert train(1, disk / "run", from_resume="1", **flags) == [0], log_of(disk / "run")
    assert result_of(disk / "run")["final"] == result_of(whole)["final"]


def test_a_line_that_was_written_by_half_is_completed_or_taken_back(tmp_path, monkeypatch):
    """Also where the part could not be cut off again at once."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.start(0)
    log.write("train", 1, value=1)
    real = open

    def failing(*args, **kwargs):
        file = real(*args, **kwargs)

        class Half:
            tell, __enter__ = file.tell, lambda self: self

            def __exit__(self, *_):
                file.close()

            def truncate(self, end):
                if file.tell() != end:
                    raise OSError(5, "Input/output error")

            def write(self, data):
                return file.write(data[: len(data) // 2])

        return Half()

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        log.write("train", 2, value=2)
    assert not log.path.read_bytes().endswith(b"\n"), "half a line is there"
    log.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]
