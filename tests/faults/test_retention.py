"""What is deleted, what is not, and who may train into a directory: one verified checkpoint is always left."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.savers import assert_is_whole, publish
from tests.faults.strace import Child, points_of, read_log, straced
from tests.small_world import TINY, write_rows
from training.checkpoints.store import CheckpointStore

ROOT = Path(__file__).resolve().parent.parent.parent


def delete_step_one(connection, directory):
    CheckpointStore(directory).delete(1)


def test_a_deletion_killed_at_any_call_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, strace):
    points, case = [None], 0
    while case < len(points):
        store = CheckpointStore(tmp_path / f"{case}", keep_last=2)
        for step in (1, 2):
            publish(store, step, ranks=2)
        point, child = points[case], Child(delete_step_one, store.directory)
        with straced(
            [child], tmp_path / "log", *(["-e", f"inject={point[0]}:signal=KILL:when={point[1]}"] if point else [])
        ):
            child.go()
            child.heard()
        if point is None:
            points += points_of(read_log(tmp_path / "log"))
        said = []
        assert store.newest_verified(said.append) == 2 and not said
        assert store.steps() in ([1, 2], [2])
        for step in store.steps():
            assert_is_whole(store.path(step), step)
        publish(store, 3)
        assert sorted(os.listdir(store.directory)) == ["step-00000002", "step-00000003"], point
        case += 1
    print(f"{case} deletions, killed at all of their {case - 1} calls but in one")
    assert case > 6


FOREIGN = {
    "a directory without a manifest": lambda path, elsewhere: path.mkdir(),
    "a directory with files of others": lambda path, elsewhere: (path.mkdir(), (path / "mine").write_text("x")),
    "a link to a directory": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a link to nowhere": lambda path, elsewhere: path.symlink_to(elsewhere / "missing"),
    "a file": lambda path, elsewhere: path.write_text("mine"),
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
}
PLACES = ["step-00000002", "step-00000003", "step-99999999", "step-000000001", ".tmp-step-00000003",
          ".trash-step-00000001", "aside-step-00000003", ".tmp-step-guide", "step-2"]  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("place", PLACES)
def test_what_others_have_put_there_stops_no_save_and_is_not_deleted(tmp_path, what, place):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    publish(store, 1)
    elsewhere = tmp_path / "elsewhere"
    publish(CheckpointStore(elsewhere), 1)
    shutil.move(elsewhere / "step-00000001" / "manifest.json", elsewhere)
    FOREIGN[what](store.directory / place, elsewhere)
    for step in (3, 4, 5):
        publish(store, step)
        assert_is_whole(store.path(step), step)
    names = os.listdir(store.directory)
    assert {"step-00000004", "step-00000005"} < {*names, "-"} and "step-00000001" not in names
    assert (elsewhere / "manifest.json").exists(), "a link is never followed"
    if place.startswith((".tmp-step-0", ".trash-step-0")):
        assert place not in names, "such names are the saver's own"
    elif place == "step-00000003":
        assert "aside-step-00000003" in names
    else:
        assert place in names
    if place != "step-99999999" or "directory" not in what or "link" in what:
        assert store.newest_verified(pytest.fail) == 5
    else:  # it may be one of ours that has lost its manifest, so it is told of and passed over
        said = []
        assert store.newest_verified(said.append) == 5 and "99999999" in said[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_last_and_the_best_are_kept(tmp_path, seed):
    rng = random.Random(seed)
    keep_last, keep_best, mode = rng.choice((2, 3)), rng.choice((0, 1, 2)), rng.choice(("min", "max"))
    store = CheckpointStore(tmp_path, keep_last, keep_best, "eval/f1", mode)
    measured, saved = {}, []
    for step in range(1, 13):
        value = rng.choice((None, None, float("nan"), float("inf"), *(rng.randrange(5) / 4 for _ in range(6))))
        publish(store, step, **({} if value is None else {"eval/f1": value}), **{"eval/loss": rng.random()})
        saved.append(step)
        if value is not None and value == value and value != float("inf"):
            measured[step] = value
        ranked = sorted(measured, key=lambda s: (measured[s] if mode == "min" else -measured[s], s))
        expected = sorted({*saved[-keep_last:], *ranked[:keep_best]})
        assert store.steps() == expected, (seed, step, measured)
        assert store.newest_verified(pytest.fail) == step
        measured = {s: v for s, v in measured.items() if s in expected}
        saved = [s for s in saved if s in expected]
    print(f"seed {seed}: keep_last {keep_last}, keep_best {keep_best} {mode}")


def test_a_second_launch_is_refused_at_once_naming_process_and_host(tmp_path):
    flags = {**TINY, "data_path": write_rows(tmp_path / "rows.jsonl"), "save_dir": tmp_path / "run", "epochs": 200}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "train_full_sft.py", *words, "--cache_dir", str(tmp_path / "cache")]
    quiet = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    first = subprocess.Popen(command, **quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        lock, deadline = tmp_path / "run" / ".lock", time.monotonic() + 60
        while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        started = time.monotonic()
        second = subprocess.run([*command, "--from_resume", "1"], **quiet, capture_output=True, text=True, timeout=60)
        seconds = time.monotonic() - started
    finally:
        first.kill()
        first.wait()
    print(f"refused after {seconds:.2f} s, the start of Python included")
    assert second.returncode == 2
    assert f"process {first.pid} on {socket.gethostname()}" in second.stderr and "Traceback" not in second.stderr
    assert seconds < 2
