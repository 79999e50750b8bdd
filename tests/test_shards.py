"""Tensors cut into blocks, written by several ranks, read back in any other cut: bits stay, nothing is made up."""

import hashlib
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.faults.savers import publish, weight_of
from training.checkpoints.store import CheckpointStore
from training.checkpoints.tensor_files import DTYPES, ShardReader, bytes_of, write_shard

shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def cuts(draw, shape):
    """Blocks that make up a shape, as (offsets, sizes): every axis is cut at places of its own, also into nothing."""
    blocks = [((), ())]
    for length in shape:
        places = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        spans = list(zip([0, *places], [*places, length], strict=True))
        blocks = [((*at, a), (*sizes, b - a)) for at, sizes in blocks for a, b in spans]
    return blocks


def block_of(tensor, offsets, sizes):
    return tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


def random_tensor(shape, dtype, seed):
    """Any bits, so NaN and denormal values too."""
    count = dtype.itemsize * int(torch.tensor(shape).prod()) if shape else dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    values = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return values.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)), shape=shapes, seed=st.integers(0, 2**32))
def test_what_is_written_in_any_cut_is_read_back_in_any_other(tmp_path_factory, data, dtype, shape, seed):
    directory = tmp_path_factory.mktemp("shards")
    whole = random_tensor(shape, dtype, seed)
    written, read = data.draw(cuts(shape)), data.draw(cuts(shape))
    files = []
    for rank, (offsets, sizes) in enumerate(written):
        block = block_of(whole, offsets, sizes)
        if rank % 2 and block.dim() == 2:
            block = block.T.contiguous().T  # laid out otherwise in memory
        files.append(directory / f"model-{rank + 1:05d}-of-{len(written):05d}.safetensors")
        listed = write_shard(files[-1], {"t": (block, offsets, shape), "other": (torch.ones(1), (0,), (1,))})
        content = files[-1].read_bytes()
        assert listed == {
            "name": files[-1].name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()
        }  # fmt: skip
    reader = ShardReader(files)
    if whole.numel():
        assert reader.shapes == {"t": shape, "other": (1,)}
        assert bits(reader.whole("t")) == bits(whole)
    for offsets, sizes in read:
        target = torch.zeros(sizes, dtype=dtype)
        reader.read("t", target, offsets)
        assert bits(target) == bits(block_of(whole, offsets, sizes))


def two_files(directory, missing=()):
    """A tensor of 4 x 6 in two files of two blocks each, less the blocks that are missing."""
    whole = torch.arange(24.0).reshape(4, 6)
    paths = []
    for rank in range(2):
        blocks = {"rest": (torch.ones(2), (2 * rank,), (4,))}
        if rank not in missing:
            blocks["w"] = (whole[2 * rank : 2 * rank + 2], (2 * rank, 0), (4, 6))
        paths.append(directory / f"model-{rank + 1:05d}-of-00002.safetensors")
        write_shard(paths[-1], blocks)
    return whole, paths


def test_values_that_no_file_holds_are_never_made_up(tmp_path):
    whole, paths = two_files(tmp_path, missing=[1])
    reader, target = ShardReader(paths), torch.zeros(2, 6)
    reader.read("w", target, (0, 0))
    assert torch.equal(target, whole[:2]), "what is there can be read"
    with pytest.raises(ValueError, match="w: the files hold 6 of the 12 values"):
        reader.read("w", target, (1, 0))
    with pytest.raises(ValueError, match="w: the files hold 12 of the 24 values"):
        reader.tensors()
    with pytest.raises(ValueError, match="absent: the files hold 0 of the 12"):
        reader.read("absent", target, (0, 0))


@pytest.mark.parametrize(("missing", "row"), [((), 1), ((1,), 0)])
def test_blocks_that_overlap_are_refused_also_where_their_sizes_add_up(tmp_path, missing, row):
    """Two blocks of the same rows and none of the others would pass a count of values."""
    _, paths = two_files(tmp_path, missing)
    again = tmp_path / "model-00003-of-00003.safetensors"
    write_shard(again, {"w": (torch.zeros(2, 6), (row, 0), (4, 6))})
    with pytest.raises(ValueError, match="w: two files hold the same values"):
        ShardReader([*paths, again]).whole("w")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: write_other(path, "w", (5, 6)),
        lambda path: path.unlink(),
    ],
)
def test_a_file_that_is_none_or_contradicts_another_is_named(tmp_path, spoil):
    _, paths = two_files(tmp_path)
    spoil(paths[1])
    with pytest.raises((ValueError, OSError), match=paths[1].name):
        ShardReader(paths)


def write_other(path, name, shape):
    path.unlink()
    write_shard(path, {name: (torch.zeros(1, 6), (0, 0), shape)})


def test_a_file_is_never_written_over(tmp_path):
    _, paths = two_files(tmp_path)
    before = paths[0].read_bytes()
    with pytest.raises(FileExistsError):
        write_shard(paths[0], {"w": (torch.zeros(1), (0,), (1,))})
    assert paths[0].read_bytes() == before


def test_an_empty_share_is_a_file_without_tensors(tmp_path):
    """A rank to which no row of any tensor falls."""
    nothing = {"w": (torch.zeros(0, 6), (4, 0), (4, 6))}
    assert bytes_of(nothing) == 0
    write_shard(tmp_path / "model-00003-of-00003.safetensors", nothing)
    assert load_file(tmp_path / "model-00003-of-00003.safetensors") == {}
    whole, paths = two_files(tmp_path)
    assert torch.equal(ShardReader([*paths, tmp_path / "model-00003-of-00003.safetensors"]).whole("w"), whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reader_of_torch_opens_a_checkpoint_directory_too(tmp_path, ranks):
    """The files are a format of others', not one that only this project reads."""
    checkpoint = publish(CheckpointStore(tmp_path), 5, ranks)
    target = {
        "weight": torch.zeros_like(weight_of(5)),
        "weight:moment": torch.zeros_like(weight_of(5)),
        "weight:step": torch.zeros(()),
    }
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert torch.equal(target["weight"], weight_of(5)) and torch.equal(target["weight:moment"], -weight_of(5))
    assert target["weight:step"].item() == 5
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sum(entry["name"].startswith(("model-", "optimizer-")) for entry in manifest["files"]) == 2 * ranks
