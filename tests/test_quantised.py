"""Weights in a few bits are named and refused, before anything is loaded or tokenised."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import ModelRequest
from model.export import export_model
from model.loading import load_model, load_skeleton
from model.quantised import quantisation_of
from scripts.chat import main as chat
from scripts.train_distillation import distill
from tests.small_world import TINY, log_of, train, write_rows
from tests.test_export import TOKENIZER
from tests.tiny_model import foreign, tiny
from training.config import make_config

METHODS = {
    "in 4 bits (bitsandbytes)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "in 8 bits (bitsandbytes)": {"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0},
    "in 4 bits (gptq)": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "in 3 bits (awq)": {"quant_method": "awq", "w_bit": 3},
    "in 8 bits (fp8)": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "in 4 bits (mxfp4)": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "in 4 bits (compressed-tensors)": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {
            "group_0": {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 4}, "targets": ["Linear"]}
        },
    },
    "in 2 bits (hqq)": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}},
    "in 4 bits (torchao)": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "in 8 bits (quanto)": {"quant_method": "quanto", "weights": "float8"},
    "in 4 bits (modelopt)": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "quantised with newest": {"quant_method": "newest"},
    "quantised with unknown method": {"group_size": 64},
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    export_model(tmp_path / "base", tiny(vocab_size=6400), TOKENIZER)
    return tmp_path / "base"


def say_of(directory, **more):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **more}))


@pytest.mark.parametrize("said", METHODS)
def test_each_method_is_named_with_its_bits(said):
    assert quantisation_of({"quantization_config": METHODS[said]}) == said
    assert quantisation_of({"text_config": {"quantization_config": METHODS[said]}}) == said
    assert quantisation_of({"compression_config": METHODS[said]}) == said


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_configuration_is_none(base, nothing):
    say_of(base, quantization_config=nothing)
    assert ModelRequest(from_weight=str(base)) and load_model(base) and load_skeleton(base)


def test_a_run_ends_before_it_prepares_anything(tmp_path, base, capsys):
    say_of(base, quantization_config=METHODS["in 4 bits (bitsandbytes)"])
    message = "weights in 4 bits (bitsandbytes) cannot be trained: take the unquantised model"
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    flags = {name: None for name in TINY if name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    flags |= {"data_path": str(rows), "from_weight": str(base), "intermediate_size": None, "dropout": 0.0}
    for more in ({}, {"lora_rank": 2}):
        assert train(1, tmp_path / "run", **flags, **more) == [2]
        assert message in log_of(tmp_path / "run")
    assert not (tmp_path / "cache").exists()
    assert chat([str(base), "--prompt", "a", "--device", "cpu"]) == 2 and message in capsys.readouterr().err

    export_model(tmp_path / "student", tiny(vocab_size=6400), TOKENIZER)
    flags |= {"teacher": str(base), "from_weight": str(tmp_path / "student"), "save_dir": str(tmp_path / "taught")}
    with pytest.raises(ValueError, match=re.escape(message)):
        distill(make_config({name: value for name, value in flags.items() if value is not None}))


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_packed_weights_are_noticed_where_nothing_is_said_of_them(tmp_path, family):
    foreign(tmp_path / "model", family)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype, said in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.int8, "I8")):
        save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
        for load in (load_model, load_skeleton):
            with pytest.raises(ValueError, match=f"weights of type {said} cannot be trained: take the unquantised"):
                load(tmp_path / "model")
    masks = {"model.mask": torch.zeros(2, dtype=torch.uint8)}
    shutil.rmtree(tmp_path / "model")
    foreign(tmp_path / "model", family)
    save_file({**tensors, **masks}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.mask is not part of it|has no model.mask"):
        load_model(tmp_path / "model")
