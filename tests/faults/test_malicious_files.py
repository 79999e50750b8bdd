"""Files that want to run code, reach outside or eat the machine: nothing of them is executed, and the code says why.

Every payload leaves a canary file when it runs, and does so where it is unpickled on purpose.
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc, parquet
from safetensors.torch import save_file

import dataset.sandbox
from dataset import store
from dataset.chat import ChatRenderer
from dataset.errors import UnsafeDataError
from dataset.prepare import DataOptions, prepare
from dataset.raw_rows import read_rows
from dataset.sources import find_sources
from dataset.system_prompts import SystemPrompts
from model.build import OWN_TOKENIZER, load_tokenizer
from model.decoder import DecoderConfig
from model.export import export_model
from model.loading import build_model, load_model
from scripts import chat, evaluate, inspect_data
from scripts.bench import gguf as compare_gguf
from tests.small_world import log_of, sign_again, train, write_rows
from tests.test_chat import PLAIN, byte_tokenizer, turns
from trainer_utils import Processes, blocks_to_write, named_optimizer_state, named_weights
from training.checkpoints.checkpointer import load_checkpoint, open_shards, read_trainer_state
from training.checkpoints.manifest import verify
from training.checkpoints.store import CheckpointStore
from training.config import make_config
from training.config.command_line import read_yaml
from training.control.exit_codes import EXIT_BUG, exit_code_of
from training.records.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
EVIL = "from pathlib import Path\nPath({!r}).touch()\n\nclass Evil:\n    pass\n"


# ---------------------------------------------------------------------------------------------------------------------
# Payloads


class Call:
    """Pickled, it is a call that happens when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved_by_torch(value, **options):
    torch.save(value, file := io.BytesIO(), **options)
    return file.getvalue()


def saved_by_numpy(value, save):
    save(file := io.BytesIO(), np.array([value], dtype=object))
    return file.getvalue()


def payloads_with(canary):
    shell, python = Call(os.system, f"touch {canary}"), f"__import__('os').mkdir({str(canary)!r})"
    return {
        **{f"protocol {number}": pickle.dumps(shell, number) for number in range(6)},
        "eval": pickle.dumps(Call(eval, python)),
        "exec": pickle.dumps(Call(exec, python)),
        "a process": pickle.dumps(Call(subprocess.check_call, ["touch", str(canary)])),
        "a method": pickle.dumps(Call(Path.touch, Path(canary))),
        "a pickle in a pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(shell))),
        "global and reduce": f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "inst": f"(S'touch {canary}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'touch {canary}'\no.".encode(),
        "torch": saved_by_torch(shell),
        "torch, old form": saved_by_torch(shell, _use_new_zipfile_serialization=False),
        "npy": saved_by_numpy(shell, lambda file, array: np.save(file, array, allow_pickle=True)),
        "npz": saved_by_numpy(shell, lambda file, array: np.savez(file, array=array, allow_pickle=True)),
        "gzip": gzip.compress(pickle.dumps(shell)),
    }


def open_as_meant(name, content):
    if name.startswith("torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    elif name.startswith("np"):
        opened = np.load(io.BytesIO(content), allow_pickle=True)
        opened["array"] if name == "npz" else None
    else:
        pickle.loads(gzip.decompress(content) if name == "gzip" else content)


@pytest.mark.parametrize("name", payloads_with("x"))
def test_the_payloads_do_run_where_they_are_unpickled(name, tmp_path):
    canary = tmp_path / "canary"
    content = payloads_with(canary)[name]
    assert not canary.exists()
    open_as_meant(name, content)
    assert canary.exists()


def test_there_are_enough_payloads():
    assert len(payloads_with("x")) >= 12


# ---------------------------------------------------------------------------------------------------------------------
# A payload in every place


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good files of every kind that is read, to put payloads into copies of."""
    world = tmp_path_factory.mktemp("world")
    rows = write_rows(world / "rows.jsonl")
    model = build_model(DecoderConfig(**SHAPE), seed=0)
    export_model(world / "final", model, OWN_TOKENIZER)
    shutil.copytree(world / "final", world / "mistral")  # the same, but loaded by transformers
    rewrite_json(world / "mistral" / "config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    checkpoints = CheckpointStore(world / "checkpoints")
    kinds = {"model": named_weights(model), "optimizer": named_optimizer_state(model, optimizer)}
    alone = Processes(0, 0, 1, torch.device("cpu"))
    checkpoints.begin(3)
    shards = {kind: blocks_to_write(tensors, alone, copy=False) for kind, tensors in kinds.items()}
    checkpoints.write_part(3, 0, 1, shards, {"loop": {}})
    checkpoints.publish(3, 1)
    shutil.copytree(OWN_TOKENIZER, world / "tokenizer")
    assert tokenise(rows) == 0
    assert load(world / "final") == load(world / "mistral") == resume(world / "checkpoints" / "step-00000003") == 0
    return world


def rewrite_json(path, **changes):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (old | changes).items() if value is not None}))


def code_of(action, *arguments):
    """The exit code of a program whose work this is; what has no code is a bug and is raised."""
    try:
        action(*arguments)
    except Exception as error:
        if (code := exit_code_of(error)) == EXIT_BUG:
            raise
        return code
    return 0


def load(directory):
    return code_of(load_model, directory)


def resume(directory):
    def work():
        verify(directory)
        read_trainer_state(directory)
        model = build_model(DecoderConfig(**SHAPE), seed=1)
        shards = [open_shards(directory, kind) for kind in ("model", "optimizer")]
        load_checkpoint(*shards, model, torch.optim.AdamW(model.parameters()))

    return code_of(work)


small = byte_tokenizer()


def tokenise(path):
    return code_of(lambda: prepare(path, small, DataOptions(), path.parent / "cache", echo=lambda _: None, processes=1))


def in_weights(base, name, *removed):
    def place(world, here, payload):
        directory = shutil.copytree(world / base, here / "model")
        for other in removed:
            (directory / other).unlink()
        (directory / name).write_bytes(payload)
        return load(directory)

    return place


def in_sharded_weights(base, shard):
    def place(world, here, payload):
        directory = shutil.copytree(world / base, here / "model")
        (directory / "model.safetensors").unlink()
        names = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": shard}})
        (directory / "model.safetensors.index.json").write_text(names)
        (here / "evil.bin").write_bytes(payload)
        (here / "evil.safetensors").write_bytes(payload)
        (directory / "evil.bin").write_bytes(payload)
        return load(directory)

    return place


def in_adapter(world, here, payload):
    directory = shutil.copytree(world / "mistral", here / "model")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(here / "elsewhere")}))
    (directory / "adapter_model.bin").write_bytes(payload)
    return load(directory)


def in_tokenizer(name, *removed):
    def place(world, here, payload):
        directory = shutil.copytree(world / "tokenizer", here / "tokenizer")
        for other in removed:
            (directory / other).unlink()
        (directory / name).write_bytes(payload)
        return code_of(lambda: ChatRenderer(load_tokenizer(str(directory))))

    return place


def in_template_file(world, here, payload):
    (here / "template.jinja").write_bytes(payload)
    return code_of(lambda: ChatRenderer(load_tokenizer(str(OWN_TOKENIZER), str(here / "template.jinja"))))


def in_prompts(world, here, payload):
    (here / "prompts.txt").write_bytes(payload)
    return code_of(SystemPrompts.from_file, str(here / "prompts.txt"), 0.5, 0)


def in_checkpoint(name):
    def place(world, here, payload):
        directory = shutil.copytree(world / "checkpoints" / "step-00000003", here / "step-00000003")
        (directory / name).write_bytes(payload)
        if name != "manifest.json":  # whoever writes the file can also hash it
            sign_again(directory)
        return resume(directory)

    return place


def in_store(name):
    def place(world, here, payload):
        rows = Path(shutil.copy(world / "rows.jsonl", here / "rows.jsonl"))
        (directory,) = shutil.copytree(world / "cache", here / "cache").iterdir()
        assert store.is_intact(directory)
        (directory / name).write_bytes(payload)
        code = tokenise(rows)
        assert store.is_intact(directory), "made anew"
        return code

    return place


def in_data(name):
    def place(world, here, payload):
        (here / name).write_bytes(gzip.compress(payload) if name.endswith(".gz") else payload)
        return tokenise(here / name)

    return place


def in_table(save, where):
    """As a column of bytes, or as the description that old versions of pyarrow unpickled."""

    def place(world, here, payload):
        field = pa.field("text", pa.string())
        values = pa.array(["a text"])
        if where == "extension":
            names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
            field = field.with_metadata(names)
        elif where == "schema":
            field = field.with_metadata({b"pandas": payload, b"ARROW:schema": payload})
        else:
            field, values = pa.field("text", pa.binary()), pa.array([payload])
        save(pa.Table.from_arrays([values], schema=pa.schema([field])), here / "rows.table")
        return tokenise(here / "rows.table")

    return place


def save_arrow(table, path):
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def in_saved_data_set(name):
    def place(world, here, payload):
        (here / "saved").mkdir()
        for file in ("state.json", "dataset_info.json", "dataset_dict.json"):
            if file == name or (file != "dataset_dict.json" and name != "dataset_dict.json"):
                (here / "saved" / file).write_bytes(payload if file == name else b"{}")
        return code_of(find_sources, str(here / "saved"))

    return place


def in_config(world, here, payload):
    (here / "run.yaml").write_bytes(payload)
    return code_of(lambda: make_config(read_yaml(str(here / "run.yaml"))))


def in_records(world, here, payload):
    (here / "metrics.jsonl").write_bytes(payload)
    return code_of(read_records, here / "metrics.jsonl")


SHARD, OPTIMIZER = "model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"
PLACES = {  # what reads the payload there, and the exit codes that are right
    "pickled weights only": (in_weights("final", "pytorch_model.bin", "model.safetensors"), {77}),
    "pickled weights only, transformers": (in_weights("mistral", "pytorch_model.bin", "model.safetensors"), {77}),
    "a pickle beside the weights": (in_weights("final", "pytorch_model.bin"), {0}),
    "a pickle beside the weights, transformers": (in_weights("mistral", "pytorch_model.bin"), {0}),
    "model.safetensors": (in_weights("final", "model.safetensors"), {77, 2}),
    "model.safetensors, transformers": (in_weights("mistral", "model.safetensors"), {77, 2}),
    "a second shard": (in_weights("final", "model-00002.safetensors"), {77, 2}),
    "config.json": (in_weights("final", "config.json"), {2}),
    "generation_config.json": (in_weights("mistral", "generation_config.json"), {0, 2}),
    "index": (in_weights("mistral", "model.safetensors.index.json", "model.safetensors"), {2}),
    "index names .bin": (in_sharded_weights("mistral", "evil.bin"), {77}),
    "index names ../": (in_sharded_weights("mistral", "../evil.bin"), {77}),
    "index names ../ .safetensors": (in_sharded_weights("mistral", "../evil.safetensors"), {77}),
    "index of the built-in family": (in_sharded_weights("final", "../evil.bin"), {77}),
    "adapter": (in_adapter, {77}),
    "tokenizer.json": (in_tokenizer("tokenizer.json"), {2}),
    "tokenizer_config.json": (in_tokenizer("tokenizer_config.json"), {2}),
    "special_tokens_map.json": (in_tokenizer("special_tokens_map.json"), {0, 2}),
    "added_tokens.json": (in_tokenizer("added_tokens.json"), {0, 2}),
    "tokenizer.model": (in_tokenizer("tokenizer.model", "tokenizer.json"), {2}),
    "vocab.json": (in_tokenizer("vocab.json", "tokenizer.json"), {2}),
    "chat_template.jinja": (in_tokenizer("chat_template.jinja"), {0, 2}),  # a pickle of ASCII is a text like any other
    "--chat_template": (in_template_file, {0, 2}),
    "--system_prompts": (in_prompts, {0, 2}),
    "shard of a checkpoint": (in_checkpoint(SHARD), {74}),
    "optimizer of a checkpoint": (in_checkpoint(OPTIMIZER), {74}),
    "trainer_state.json": (in_checkpoint("trainer_state.json"), {74}),
    "manifest.json": (in_checkpoint("manifest.json"), {74}),
    "meta.json of the token store": (in_store("meta.json"), {0}),  # made anew
    "array of the token store": (in_store("ids.bin"), {0}),
    ".jsonl": (in_data("a.jsonl"), {65}),
    ".json": (in_data("a.json"), {65}),
    ".jsonl.gz": (in_data("a.jsonl.gz"), {65}),
    ".json.gz": (in_data("a.json.gz"), {65}),
    ".parquet": (in_data("a.parquet"), {65}),
    ".arrow": (in_data("a.arrow"), {65}),
    ".npy": (in_data("a.npy"), {65}),
    "extension type in Arrow": (in_table(save_arrow, "extension"), {0}),
    "extension type in Parquet": (in_table(parquet.write_table, "extension"), {0}),
    "schema in Arrow": (in_table(save_arrow, "schema"), {0}),
    "schema in Parquet": (in_table(parquet.write_table, "schema"), {0}),
    "bytes in Arrow": (in_table(save_arrow, "column"), {0, 65}),
    "bytes in Parquet": (in_table(parquet.write_table, "column"), {0, 65}),
    "state.json of a data set": (in_saved_data_set("state.json"), {2}),
    "dataset_dict.json": (in_saved_data_set("dataset_dict.json"), {2}),
    "--config": (in_config, {2}),
    "metrics.jsonl": (in_records, {0}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("place", PLACES)
def test_no_payload_runs_in_any_place(place, world, tmp_path):
    read, codes = PLACES[place]
    canary, found = tmp_path / "canary", {}
    for number, (name, payload) in enumerate(payloads_with(canary).items()):
        (here := tmp_path / str(number)).mkdir()
        found[name] = read(world, here, payload)
        assert not canary.exists(), f"{name} was executed"
    assert set(found.values()) <= codes, found
    if 77 in codes:  # what tells itself to be a pickle is refused as one
        assert found["protocol 4"] == found["torch"] == 77


def test_pickles_of_a_data_set_of_the_hub_are_not_read(tmp_path, monkeypatch):
    """`datasets` infers the format from the files, of a directory as of the Hub."""
    from dataset.sources import _files_from_hub

    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    for suffix in ("pkl", "pickle", "pt", "npy"):
        (directory := tmp_path / "owner" / suffix).mkdir(parents=True)
        (directory / f"data.{suffix}").write_bytes(payloads_with(canary)["protocol 4"])
        assert code_of(_files_from_hub, f"owner/{suffix}", None, None) == 2
    assert not canary.exists()


YAML = {
    "apply": "seed: !!python/object/apply:os.system ['touch {}']",
    "new": "seed: !!python/object/new:os.system ['touch {}']",
    "name": "seed: !!python/name:os.system",
    "module": "seed: !!python/module:os",
    "a pickle": "seed: !!python/object/apply:pickle.loads [!!binary 'gASV']  # {}",
    "aliases that multiply": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nseed: [*b, *b, *b]",
    "nested without end": "seed: " + "[" * 5000,
    "no date": "seed: 2020-13-45",
    "no number": "seed: " + "9" * 5000,
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_is_plain_values(kind, tmp_path):
    assert in_config(None, tmp_path, YAML[kind].format(tmp_path / "canary").encode()) == 2
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors whose header lies


def tensors_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
HEADERS = {
    "empty": b"",
    "huge length": struct.pack("<Q", 2**63) + b"{}",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "offset beyond the file": tensors_of({"a": entry([2], [1000, 1008])}, bytes(8)),
    "no data": tensors_of({"a": entry([2], [0, 8])}),
    "overlap": tensors_of({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)),
    "the same bytes twice": tensors_of({"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, bytes(8)),
    "backwards": tensors_of({"a": entry([2], [8, 0])}, bytes(8)),
    "negative shape": tensors_of({"a": entry([-2], [0, 8])}, bytes(8)),
    "negative offset": tensors_of({"a": entry([2], [-8, 0])}, bytes(8)),
    "shape that overflows": tensors_of({"a": entry([2**62, 4], [0, 8])}, bytes(8)),
    "unknown dtype": tensors_of({"a": entry([1], [0, 8], "OBJECT")}, bytes(8)),
    "dtype of another size": tensors_of({"a": entry([2], [0, 8], "F64")}, bytes(8)),
    "a key twice": tensors_of(TWICE, bytes(16)),
    "a list": tensors_of(b"[]"),
    "nested without end": tensors_of(b"[" * 100_000),
    "bytes that nobody owns": tensors_of({"a": entry([2], [0, 8])}, bytes(4096)),
    "header bomb": tensors_of({f"t{number}": entry([0], [0, 0]) for number in range(20_000)}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused_wherever_weights_are_read(kind, world, tmp_path):
    started = time.process_time()
    codes = [in_weights("final", "model.safetensors"), in_weights("mistral", "model.safetensors")]
    codes += [in_checkpoint(SHARD), in_checkpoint(OPTIMIZER)]
    found = []
    for number, place in enumerate(codes):
        (here := tmp_path / str(number)).mkdir()
        found.append(place(world, here, HEADERS[kind]))
    assert found == ([2, 2, 2, 2] if kind == "header bomb" else [2, 2, 74, 74])  # the bomb's names fit no model
    assert time.process_time() - started < 20


@pytest.mark.parametrize("dtype", ["int64", "bool", "float8_e4m3fn"])
def test_weights_of_a_wrong_dtype_are_refused(dtype, world, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(world / "final" / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name].to(getattr(torch, dtype))}, tmp_path / "wrong.safetensors")
    content = (tmp_path / "wrong.safetensors").read_bytes()
    assert in_weights("final", "model.safetensors")(world, tmp_path, content) == 2
    assert in_checkpoint(SHARD)(world, tmp_path, content) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Names that reach outside


@pytest.mark.parametrize(
    "name", ["../trainer_state.json", "/etc/passwd", "a/../../b", "..", ".hidden", "a\\b", "a\nb", ""]
)
def test_a_manifest_cannot_reach_outside(name, world, tmp_path):
    directory = shutil.copytree(world / "checkpoints" / "step-00000003", tmp_path / "step-00000003")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert resume(directory) == 77
    newest = CheckpointStore(tmp_path).newest_verified
    assert code_of(newest, lambda message: None) == 77, "there is no other"
    shutil.copytree(world / "checkpoints" / "step-00000003", older := tmp_path / "step-00000002")
    rewrite_json(older / "manifest.json", step=2)
    sign_again(older)
    assert newest(lambda message: None) == 2, "one flipped bit makes such a name: a good one before it is taken"


@pytest.mark.parametrize("name", ["../rows.arrow", "/etc/passwd", "a/../../b", "..", ".", "", None, 3, ["a"]])
def test_a_saved_data_set_cannot_reach_outside(name, tmp_path):
    (directory := tmp_path / "saved").mkdir()
    (directory / "dataset_info.json").write_text("{}")
    for filename, code in ((name, 77), ("data-00000-of-00001.arrow", 0)):
        (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": filename}]}))
        assert code_of(find_sources, str(directory)) == code


STORE = {
    "addresses": lambda meta: meta["arrays"]["offsets"].update(dtype="|O"),
    "a record": lambda meta: meta["arrays"]["offsets"].update(dtype="V8"),
    "a program": lambda meta: meta["arrays"]["offsets"].update(dtype="(1,2,"),
    "another file": lambda meta: meta["arrays"].update({"../../ids": meta["arrays"]["ids"]}),
    "no arrays": lambda meta: meta.update(arrays={}),
    "a list": lambda meta: meta.update(arrays=[]),
}


@pytest.mark.parametrize("kind", STORE)
def test_a_token_store_holds_plain_numbers_and_nothing_else(kind, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    assert tokenise(rows) == 0
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert store.is_intact(directory)
    meta = json.loads((directory / "meta.json").read_text())
    STORE[kind](meta)
    (directory / "meta.json").write_text(json.dumps(meta))
    assert not store.is_intact(directory)
    with pytest.raises(ValueError):
        store.TokenStore(directory)
    assert tokenise(rows) == 0 and store.is_intact(directory), "made anew"


@pytest.mark.parametrize("offsets", [(0, 5, 100_000), (0, 200_000_000, 10), (0, -5, 10), (-500, 5, 10)])
@pytest.mark.parametrize("new", [ipc.new_file, ipc.new_stream])
def test_arrow_cannot_show_memory_that_is_not_its_own(new, offsets, tmp_path):
    batch, path = pa.record_batch([pa.array(["hello", "world"])], names=["text"]), tmp_path / "rows.arrow"
    with new(path, batch.schema) as writer:
        writer.write_batch(batch)
    assert [row for _, row in read_rows(path)] == [{"text": "hello"}, {"text": "world"}]
    content, right = path.read_bytes(), struct.pack("<3i", 0, 5, 10)
    assert content.count(right) == 1
    path.write_bytes(content.replace(right, struct.pack("<3i", *offsets)))
    assert tokenise(path) == 65


# ---------------------------------------------------------------------------------------------------------------------
# Code that a repository wants to be run


MODEL_CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
TOKENIZER_CODE = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
CODE = {  # changes of config.json and tokenizer_config.json, and the codes of the model and of the tokenizer
    "a family of its own": (dict(model_type="evil", architectures=["Evil"], auto_map=MODEL_CODE), {}, 77, 0),
    "no family": (dict(model_type=None, architectures=["Evil"], auto_map=MODEL_CODE), {}, 77, 0),
    "code of another repository": (
        dict(model_type="evil", auto_map={"AutoModelForCausalLM": "owner/name--evil.Evil"}), {}, 77, 0,
    ),
    "trust me": (dict(model_type="evil", trust_remote_code=True, auto_map=MODEL_CODE), {}, 77, 0),
    "a known family": (dict(model_type="mistral", architectures=["Evil"], auto_map=MODEL_CODE), {}, 0, 0),
    "a tokenizer of its own": (
        {}, dict(tokenizer_class="Evil", auto_map=TOKENIZER_CODE, trust_remote_code=True), 0, 77,
    ),
    "a nameless tokenizer": ({}, dict(tokenizer_class=None, auto_map=TOKENIZER_CODE), 0, 77),
    "a known tokenizer": ({}, dict(auto_map=TOKENIZER_CODE), 0, 0),
    "a model as tokenizer": (
        dict(model_type="evil", architectures=["Evil"], auto_map=MODEL_CODE),
        dict(tokenizer_class="AutoModelForCausalLM"), 77, 77,
    ),
    "a model as tokenizer of the model": (dict(tokenizer_class="AutoModel"), dict(tokenizer_class=None), 0, 77),
    "the choice as tokenizer": ({}, dict(tokenizer_class="AutoTokenizer", auto_map=TOKENIZER_CODE), 0, 77),
    "a reader of pickles as tokenizer": ({}, dict(tokenizer_class="RagRetriever"), 0, 77),
    "a number as tokenizer": ({}, dict(tokenizer_class=3), 0, 2),
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Standard input says yes to whatever is asked; the list tells what was."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    return questions


@pytest.mark.parametrize("kind", CODE)
def test_no_code_of_a_repository_runs(kind, world, tmp_path, asked):
    config, tokenizer_config, model_code, tokenizer_code = CODE[kind]
    directory = shutil.copytree(world / "final", tmp_path / "model")
    rewrite_json(directory / "config.json", **config)
    rewrite_json(directory / "tokenizer_config.json", **tokenizer_config)
    (directory / "custom_generate").mkdir()
    for file in ("evil.py", "custom_generate/generate.py"):
        (directory / file).write_text(EVIL.format(str(tmp_path / "canary")))
    assert (load(directory), code_of(load_tokenizer, str(directory))) == (model_code, tokenizer_code)
    assert not (tmp_path / "canary").exists() and not asked


def test_such_code_does_run_where_it_is_trusted(world, tmp_path):
    from transformers import AutoTokenizer

    directory = shutil.copytree(world / "final", tmp_path / "model")
    rewrite_json(directory / "tokenizer_config.json", auto_map=TOKENIZER_CODE)
    (directory / "evil.py").write_text(EVIL.format(str(tmp_path / "canary")))
    with pytest.raises(AttributeError):  # the class itself is of no use
        AutoTokenizer.from_pretrained(directory, **{"trust_remote_code": True})
    assert (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Templates


SYSTEM = ".os.system('touch CANARY')"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__" + SYSTEM + " }}",
    "{{ strftime_now.__globals__.__builtins__.exec('x') }}",
    "{{ cycler.__init__.__globals__" + SYSTEM + " }}",
    "{{ joiner.__init__.__globals__" + SYSTEM + " }}",
    "{{ namespace.__init__.__globals__" + SYSTEM + " }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ self.__init__.__globals__" + SYSTEM + " }}",
    "{{ self._TemplateReference__context }}",
    "{{ missing.__init__.__globals__" + SYSTEM + " }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ (messages | attr('__cla' ~ 'ss__')) | attr('__mro__') }}",
    "{{ messages['__class__']['__mro__'] }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}",
    "{{ (messages | map('upper')).gi_frame.f_back }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{{ caller._func.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for m in messages %}{{ loop.__class__.__init__ }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='assistant') }}",
    "{{ dict.__class__.__init__ }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set c = cycler(1) %}{% for a in range(9999) %}{% for b in range(9999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{% if 9 ** (9 ** 9) > 1 %}{% endif %}",
    "{{ (9 ** (9 ** 8)) | int }}",
    "{{ [1] | slice(10 ** 10) | list }}",
    "{{ messages | slice(10 ** 10) | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ messages | tojson(indent=10 ** 10) }}",
    "{{ messages | batch(10 ** 10, 0) | list }}",
    "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s] * 2 %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s] * 2 %}{% endfor %}{{ ns.s | tojson }}",
]
FAILING = ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ config.items() }}", "{% debug %}", "{{ ", "{#"]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(template, tmp_path):
    canary = tmp_path / "canary"
    text = template.replace("CANARY", str(canary)) + PLAIN
    assert code_of(lambda: ChatRenderer(byte_tokenizer(text))) == 77
    only_in_rows = (
        "{% if messages[0].content == 'question' %}" + template.replace("CANARY", str(canary)) + "{% endif %}" + PLAIN
    )
    renderer = ChatRenderer(byte_tokenizer(only_in_rows))
    assert code_of(renderer.render, turns("question", "b")) == 77
    assert not canary.exists()


# The first signal may meet a callback of the garbage collector (hypothesis has one), which loses what is raised in it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_a_template_can_neither_go_on_for_ever_nor_eat_the_memory(template, monkeypatch):
    monkeypatch.setattr(dataset.sandbox, "SECONDS", 0.5)
    monkeypatch.setattr(dataset.sandbox, "MEMORY", 128 << 20)
    started = time.process_time()
    assert code_of(lambda: ChatRenderer(byte_tokenizer(template + PLAIN))) == 77
    assert time.process_time() - started < 2.5
    assert ChatRenderer(byte_tokenizer()).render(turns("a", "b")).supervised.any(), "the limits are gone again"


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_only_fails_is_an_error_like_any_other(template):
    assert code_of(lambda: ChatRenderer(byte_tokenizer(template + PLAIN))) == 2


@pytest.mark.parametrize("name", ["''.__class__", "'' | attr('__class__')", "''['__class__']"])
def test_what_is_only_named_is_written_as_nothing(name):
    """Of constants, which jinja looks up while it compiles."""
    tokenizer = byte_tokenizer("{{ " + name + " }}" + PLAIN)
    text = tokenizer.decode(ChatRenderer(tokenizer).render(turns("a", "b")).ids)
    assert text.startswith("<|im_start|>user\na<|im_end|>")


def test_the_default_limits_are_those_that_are_documented():
    assert dataset.sandbox.SECONDS == 5.0 and dataset.sandbox.MEMORY == 1 << 30


def test_a_row_that_is_refused_tells_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.sandbox, "SECONDS", 0.3)
    rows = write_rows(tmp_path / "rows.jsonl")
    slow = "{% if messages[0].content == 'Say 6' %}" + ENDLESS[0] + "{% endif %}"
    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    tokenizer.chat_template = slow + tokenizer.chat_template
    for bad_rows in ("error", "skip"):
        with pytest.raises(UnsafeDataError, match=r"^line 7: the chat template took more than 0.3 seconds"):
            prepare(rows, tokenizer, DataOptions(bad_rows=bad_rows), tmp_path / "cache", echo=lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# The programs, from the outside


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return str(path)


def pickled_model(world, here, payload):
    directory = shutil.copytree(world / "final", here / "model")
    (directory / "model.safetensors").unlink()
    put(directory / "pytorch_model.bin", payload)
    return directory


def foreign_model(world, here, payload):
    directory = shutil.copytree(world / "final", here / "model")
    rewrite_json(directory / "config.json", **CODE["a family of its own"][0])
    put(directory / "evil.py", EVIL.format(str(here / "canary")))
    return directory


def hostile_template(world, here, payload):
    directory = shutil.copytree(world / "final", here / "model")
    put(directory / "chat_template.jinja", ESCAPES[2].replace("CANARY", str(here / "canary")))
    return directory


def crafted_checkpoint(name, content=None):
    """A run that was trained to its first checkpoint, of which one file is then another."""

    def flags(world, here, payload):
        run, data = here / "run", {"data_path": str(world / "rows.jsonl")}
        assert train(1, run, max_steps=1, **data) == [0], log_of(run)
        shutil.rmtree(run / "final")
        directory = run / "checkpoints" / "step-00000001"
        if content:
            text = (directory / name).read_text()
            assert content[0] in text
            put(directory / name, text.replace(*content))
        else:
            put(directory / name, payload)
            sign_again(directory)
        return {"from_resume": str(directory), "max_steps": 1, **data}

    return flags


PROGRAM_CASES = {
    "weights": (lambda *of: {"from_weight": str(pickled_model(*of))}, 77),
    "code": (lambda *of: {"from_weight": str(foreign_model(*of))}, 77),
    "template of the model": (lambda *of: {"tokenizer": str(hostile_template(*of))}, 77),
    "template file": (lambda w, h, p: {"chat_template": put(h / "t.jinja", "{{ self.__init__ }}")}, 77),
    "data": (lambda w, h, p: {"data_path": put(h / "a.jsonl", p)}, 65),
    "prompts": (lambda w, h, p: {"system_prompts": put(h / "prompts.txt", p)}, 2),
    "data set": (
        lambda w, h, p: (
            put(h / "d" / "dataset_info.json", "{}")
            and put(h / "d" / "state.json", '{"_data_files": [{"filename": "../a"}]}')
            and {"data_path": str(h / "d")}
        ),
        77,
    ),
    "checkpoint, manifest": (crafted_checkpoint("manifest.json", ('"model-', '"../model-')), 77),
    "checkpoint, shard": (crafted_checkpoint(SHARD), 74),
    "checkpoint, state": (crafted_checkpoint("trainer_state.json"), 74),
}


@pytest.mark.parametrize("kind", PROGRAM_CASES)
def test_the_trainer_refuses_with_the_right_code(kind, world, tmp_path):
    make, code = PROGRAM_CASES[kind]
    flags = make(world, tmp_path, payloads_with(tmp_path / "canary")["protocol 4"])
    if kind in ("weights", "code"):
        flags |= {
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "intermediate_size": None,
        }
        flags |= {"dropout": 0.0}
    found = train(1, tmp_path / "run", **{"data_path": str(world / "rows.jsonl"), **flags})
    log = log_of(tmp_path / "run")
    assert found == [code], log
    assert "Traceback" not in log and re.search(r"^error: ", log, flags=re.MULTILINE)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("make", [pickled_model, foreign_model, hostile_template])
def test_the_other_programs_refuse_alike(make, world, tmp_path, capsys, asked):
    directory = make(world, tmp_path, payloads_with(tmp_path / "canary")["torch"])
    data = ["--data_path", str(world / "rows.jsonl"), "--cache_dir", str(tmp_path / "cache")]
    assert evaluate.main([str(directory), *data]) == 77
    assert chat.main([str(directory), "--prompt", "Hi"]) == 77
    assert compare_gguf.main([str(directory), "model.gguf"]) == 77
    if make is hostile_template:
        assert inspect_data.main(["--from_weight", str(directory), *data]) == 77
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 + (make is hostile_template)
    assert not (tmp_path / "canary").exists() and not asked


def test_a_pipe_cannot_say_yes_for_the_user(world, tmp_path):
    """The whole way, once: a tokenizer that has transformers load a model, which would ask whether its code may run."""
    directory = shutil.copytree(world / "final", tmp_path / "model")
    rewrite_json(directory / "config.json", **CODE["a family of its own"][0])
    rewrite_json(directory / "tokenizer_config.json", tokenizer_class="AutoModelForCausalLM")
    put(directory / "evil.py", EVIL.format(str(tmp_path / "canary")))
    words = ["-m", "scripts.inspect_data", "--tokenizer", str(directory), "--data_path", str(world / "rows.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, input=b"y\n" * 9, capture_output=True, timeout=120
    )
    assert done.returncode == 77, done.stderr
    assert not (tmp_path / "canary").exists()
