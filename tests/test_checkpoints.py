"""The files of checkpoints: published whole, verified before use, kept and retired."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.checkpoints.manifest import CheckpointError, verify
from training.checkpoints.store import CheckpointStore
from training.control.lock import lock_run


def blocks(step):
    weight = torch.arange(6.0).reshape(2, 3) * step
    return {"model": {"weight": (weight, (0, 0), (2, 3))}}


def publish(store, step, **metrics):
    store.begin(step)
    store.write_part(step, 0, 1, blocks(step), {"step": step})
    return store.publish(step, 1, metrics)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_the_last_n_are_kept_and_nothing_temporary_stays(store):
    for step in (3, 6, 9):
        publish(store, step)
    assert sorted(os.listdir(store.directory)) == ["step-00000006", "step-00000009"]
    assert sorted(os.listdir(store.path(9))) == [
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "trainer_state.json",
    ]


def test_a_save_that_was_cut_short_does_not_count_and_is_swept(store):
    publish(store, 3)
    store.begin(6)
    (store.temporary(6) / "model-00001-of-00001.safetensors").write_bytes(b"half")
    assert store.newest_verified(pytest.fail) == 3
    publish(store, 9)
    assert sorted(os.listdir(store.directory)) == ["step-00000003", "step-00000009"]


def test_directories_of_others_are_left_alone(store):
    publish(store, 3)
    (store.directory / "step-old").mkdir()
    (store.directory / "notes.txt").write_text("mine")
    for step in (6, 9):
        publish(store, step)
    assert {"step-old", "notes.txt"} < set(os.listdir(store.directory))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_listed(directory, name):
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    (directory / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "a flipped bit": lambda d: flip(d / "model-00001-of-00001.safetensors"),
    "a truncated file": lambda d: os.truncate(d / "model-00001-of-00001.safetensors", 3),
    "a zeroed file": lambda d: (d / "model-00001-of-00001.safetensors").write_bytes(bytes(7)),
    "a deleted file": lambda d: (d / "trainer_state.json").unlink(),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_text(""),
    "a manifest of nothing": lambda d: (d / "manifest.json").write_text(
        '{"format_version": 1, "step": 6, "files": []}'
    ),
    "a manifest that is a list": lambda d: (d / "manifest.json").write_text("[]"),
    "another step": lambda d: os.rename(d, d.with_name("step-00000007")),
    "a path outside": lambda d: rename_listed(d, "../step-00000003/trainer_state.json"),
    "a symbolic link": lambda d: (
        (d / "trainer_state.json").rename(d / "elsewhere"),
        (d / "trainer_state.json").symlink_to("elsewhere"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(store, damage):
    publish(store, 3)
    publish(store, 6)
    assert store.newest_verified(pytest.fail) == 6
    DAMAGE[damage](store.path(6))
    warnings = []
    assert store.newest_verified(warnings.append) == 3
    assert "step-0000000" in warnings[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a flipped bit", "model-00001-of-00001.safetensors: content differs from what was written"),
        ("a truncated file", r"model-00001-of-00001.safetensors: 3 bytes, \d{3} were written"),
        ("a deleted file", "trainer_state.json: missing"),
        ("no manifest", "manifest.json: unreadable"),
    ],
)
def test_the_file_and_what_is_wrong_with_it_are_named(store, damage, message):
    path = publish(store, 6)
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match=f"{path}/{message}"):
        verify(path)


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_end(store, monkeypatch):
    publish(store, 3)
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"{a.name} -> {b.name}"), rename(a, b)))
    publish(store, 6)
    events, draft = [Path(event).name for event in events], ".tmp-step-00000006"
    written = {"model-00001-of-00001.safetensors", "trainer_state.json", ".part-0.draft"}
    published = events.index(f"{draft} -> step-00000006")
    assert set(events[: published - 2]) == written
    manifest, *rest = events[published - 2 : published + 2]
    assert manifest.startswith(".manifest.json.") and rest == [draft, events[published], "checkpoints"]


def test_if_all_are_damaged_nothing_starts_afresh_in_silence(store):
    assert store.newest_verified(pytest.fail) is None
    publish(store, 3)
    flip(store.path(3) / "trainer_state.json")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        store.newest_verified(lambda message: None)


def test_a_newer_format_is_refused(store):
    path = publish(store, 3)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format_version": 99}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        verify(path)


def test_what_lies_beyond_the_resumed_step_is_set_aside_and_never_crowds_out_the_new_ones(store):
    for step in (3, 16, 18):
        publish(store, step) if step == 3 else publish(CheckpointStore(store.directory, keep_last=9), step)
    said = []
    store.set_aside_from(4, said.append)
    assert store.steps() == [3] and len(said) == 2
    assert (store.directory / "aside-step-00000018" / "manifest.json").exists(), "nothing is lost"
    publish(store, 4)
    publish(store, 5)
    assert store.steps() == [4, 5] and store.newest_verified(pytest.fail) == 5


def test_a_directory_can_be_held_by_one_process_only(tmp_path):
    first = lock_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from training.control.lock import lock_run; lock_run(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode and f"process {os.getpid()} on" in refused.stderr
    first.close()
    assert subprocess.run(command, timeout=60).returncode == 0
