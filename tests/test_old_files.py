"""What older files hold and nobody reads: buffers that follow from config.json. Anything else is still an error."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import ModelRequest, choose_model, fill_model
from model.loading import load_model
from model.partial_weights import whole
from tests.tiny_model import foreign

MASK = torch.ones(1, 1, 4, 4).tril().to(torch.uint8)
BUFFERS = {
    "Llama": {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)},
    "Mistral": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "GPT2": {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    "GPTNeoX": {
        "gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(1),
    },
    "GPTJ": {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": torch.tensor(-1e9)},
    "Falcon": {"transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.ones(4)},
}  # fmt: skip
CHANGES = {"GPTJ": {"rotary_dim": 4, "num_key_value_heads": None, "head_dim": None}, "Falcon": {"head_dim": None}}


def both_ways(directory):
    """The weights of a model that is read whole, and of an empty one that is filled."""
    request = ModelRequest(from_weight=str(directory))
    empty = choose_model(request, 97, empty=True, quiet=True)
    empty._apply(lambda tensor: torch.empty_like(tensor, device="cpu").fill_(9) if tensor.is_meta else tensor)
    if hasattr(empty, "inner"):
        empty.inner.tie_weights()
    fill_model(empty, request, whole, torch.float32)
    return [load_model(directory).state_dict(), empty.state_dict()]


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_that_are_computed_are_left_out(tmp_path, family):
    foreign(tmp_path, family, **CHANGES.get(family, {}))
    before = both_ways(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), **BUFFERS[family]}, file, metadata={"format": "pt"})
    for old, new in zip(before, both_ways(tmp_path), strict=True):
        assert list(old) == list(new) and all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.layers.9.mlp.up_proj.weight", "v_head"])
def test_what_is_not_computed_is_not_left_out(tmp_path, family, name):
    foreign(tmp_path, family)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(32, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not fit its config.json: .*{name}"):
        both_ways(tmp_path)
