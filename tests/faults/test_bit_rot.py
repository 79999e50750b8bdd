"""Bits that flip, files that shrink, vanish or change places: found before a tensor is used, and the file is named."""

import json
import os
import random
import re
import shutil

import pytest

from tests.faults.savers import assert_is_whole, copy_fresh, publish
from tests.faults.strace import Child, straced
from tests.small_world import log_of, train, write_rows
from training.checkpoints.manifest import CheckpointError, digest_of, verify
from training.checkpoints.store import CheckpointStore

SEED = 30
BLOCK = 4096
FILES = [
    "manifest.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "trainer_state.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of two ranks: what is done to the newer one must not be loaded."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (3, 6):
        publish(CheckpointStore(directory), step, ranks=2, **{"eval/loss": 1.5 + step})
    return directory


def flip_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def zero_block(path, start):
    content = bytearray(path.read_bytes())
    content[start : start + BLOCK] = bytes(len(content[start : start + BLOCK]))
    path.write_bytes(content)


def swap(one, other):
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def rewrite(path, change):
    """Change the manifest and leave it as it would be written, but for its own checksum."""
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def delete(*keys):
    return lambda manifest: _parent(manifest, keys).pop(keys[-1])


def replace(value, *keys):
    return lambda manifest: _parent(manifest, keys).__setitem__(keys[-1], value)


def _parent(value, keys):
    for key in keys[:-1]:
        value = value[key]
    return value


def cases(saved):
    """(what is done, to which file or files, the damage as a function of the checkpoint's directory)."""
    rng = random.Random(SEED)
    for name in FILES:
        size = (saved / "step-00000006" / name).stat().st_size
        for place in [0, size * 8 - 1, *(rng.randrange(size * 8) for _ in range(28))]:
            yield f"bit {place}", [name], lambda d, name=name, place=place: flip_bit(d / name, place)
        for length in [0, 1, size // 2, size - 1, *(rng.randrange(size) for _ in range(4))]:
            yield f"cut to {length}", [name], lambda d, name=name, length=length: os.truncate(d / name, length)
        for start in range(0, size, BLOCK):
            yield f"zeros from {start}", [name], lambda d, name=name, start=start: zero_block(d / name, start)
        yield "deleted", [name], lambda d, name=name: (d / name).unlink()
        yield "a byte more", [name], lambda d, name=name: (d / name).write_bytes((d / name).read_bytes() + b"\0")
        yield "a directory", [name], lambda d, name=name: ((d / name).unlink(), (d / name).mkdir())
        yield "a link", [name], lambda d, name=name: (
            os.rename(d / name, d.parent / name), (d / name).symlink_to(d.parent / name)
        ) if name != "manifest.json" else (d / name).write_text("null")  # fmt: skip
        yield "that of step 3", [name], lambda d, name=name: shutil.copy(d.parent / "step-00000003" / name, d / name)
        for other in FILES:
            if other > name:
                yield "swapped", [name, other], lambda d, a=name, b=other: swap(d / a, d / b)
    for extra in ("model-00003-of-00003.safetensors", "model-00001-of-00001.safetensors", "more.safetensors"):
        source = "model-00001-of-00002.safetensors"
        yield "more files", [extra], lambda d, source=source, extra=extra: shutil.copy(d / source, d / extra)
    older = "step-00000003"
    yield "all of step 3", ["manifest.json"], lambda d: shutil.copytree(d.parent / older, d, dirs_exist_ok=True)

    entries = len(json.loads((saved / "step-00000006" / "manifest.json").read_text())["files"])
    fields = [("format_version",), ("step",), ("metrics",), ("files",), ("sha256",), ("metrics", "eval/loss")]
    fields += [("files", i, key) for i in range(entries) for key in ("name", "size", "sha256")]
    changes = [("without", keys, delete(*keys)) for keys in [*fields, *(("files", i) for i in range(entries))]]
    for value in (None, True, -1, 7, 1e300, "x", "../trainer_state.json", [], [7], {}, {"a": "b"}):
        changes += [(f"{value!r} as", keys, replace(value, *keys)) for keys in fields]
    for i in range(entries):
        changes.append(("twice", ("files", i), lambda manifest, i=i: manifest["files"].append(manifest["files"][i])))
    for what, keys, change in changes:
        yield f"{what} {keys}", ["manifest.json"], lambda d, change=change: rewrite(d / "manifest.json", change)
    for text in ("", "{", "null", "[]", "7", '"x"', "[" * 100_000, "9" * 5000, "\ufeff{}"):
        yield f"{text[:9]!r}", ["manifest.json"], lambda d, text=text: (d / "manifest.json").write_text(text)


def test_all_damage_is_found_named_and_passed_over(saved, tmp_path):
    directory, count = copy_fresh(saved, tmp_path / "checkpoints"), 0
    store = CheckpointStore(directory)
    for what, names, damage in cases(saved):
        copy_fresh(saved / "step-00000006", store.path(6))
        damage(store.path(6))
        with pytest.raises(CheckpointError) as found:
            verify(store.path(6))
            pytest.fail(f"{what} of {names} was not found")
        assert any(str(store.path(6) / name) in str(found.value) for name in names), (what, names, found.value)
        said = []
        assert store.newest_verified(said.append) == 3, (what, names)
        assert len(said) == 1 and "step 6 is damaged" in said[0]
        assert_is_whole(store.path(3), 3)
        count += 1
    print(f"{count} kinds of damage, seed {SEED}")
    assert count >= 300


def test_a_manifest_that_somebody_has_signed_again_still_reaches_nothing_outside(saved, tmp_path):
    """The checksum keeps accidents out, not people; those are met by rules for names and types."""
    directory = copy_fresh(saved, tmp_path / "checkpoints")
    file = directory / "step-00000006" / "manifest.json"
    written = file.read_text()
    places = [("step",), ("metrics",), ("metrics", "eval/loss"), ("files",), ("files", 0)]
    places += [("files", 0, key) for key in ("name", "size", "sha256")]
    for value in (None, "x", "../trainer_state.json", "/etc/passwd", [7], {"a": "b"}):
        for keys in places:
            manifest = json.loads(written)
            replace(value, *keys)(manifest)
            file.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))
            with pytest.raises(CheckpointError, match="manifest|trainer_state|-of-"):
                verify(file.parent)
            CheckpointStore(directory, keep_best=1).retired()  # reads the metrics of all


def verify_and_tell(connection, path):
    try:
        verify(path)
    except CheckpointError as error:
        connection.send(str(error))


@pytest.mark.parametrize("call", ["read", "openat", "newfstatat"])
def test_a_file_that_the_disk_cannot_read_is_passed_over_too(saved, tmp_path, strace, call):
    options = ["-e", f"trace={call}", "-P", str(saved / "step-00000006" / FILES[1]), "-e", f"inject={call}:error=EIO"]
    child = Child(verify_and_tell, saved / "step-00000006")
    with straced([child], tmp_path / "log", *options):
        child.go()
        said = child.heard()
    child.end()
    assert len(said) == 1 and FILES[1] in said[0], said


DAMAGE = {
    "a flipped bit": ("model-00001-of-00002.safetensors", lambda path: flip_bit(path, 80_000)),
    "a lost shard": ("optimizer-00002-of-00002.safetensors", os.remove),
    "a lost manifest": ("manifest.json", os.remove),
}


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("sharded") / "run"
    rows = write_rows(run.parent / "rows.jsonl")
    flags = {"data_path": str(rows), "strategy": "fsdp", "max_steps": 3}
    assert train(2, run, **flags) == [0, 0], log_of(run)
    return run, flags


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_was_asked_for_by_name_is_loaded_whole_or_not_at_all(sharded_run, tmp_path, damage):
    """Nothing is taken in its place: exit code 74 on all ranks, and the file is named."""
    run, flags = sharded_run
    checkpoint = shutil.copytree(run, tmp_path / "run") / "checkpoints" / "step-00000003"
    name, spoil = DAMAGE[damage]
    spoil(checkpoint / name)
    assert train(2, tmp_path / "run", from_resume=str(checkpoint), **flags) == [74, 74], log_of(tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert str(checkpoint / name) in log and "Traceback" not in log
    assert not re.search("resumed from", log)
