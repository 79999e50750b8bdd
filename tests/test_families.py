"""The decoder's options compute what families of transformers compute, and nothing else is taken for one of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.decoder import Decoder, DecoderConfig
from model.export import export_model
from model.families import config_json, decoder_config, is_builtin
from model.loading import load_model, load_skeleton
from model.partial_weights import overlap, whole
from model.transformers_model import HFCausalLM
from tests.tiny_model import logits_of, pack, tiny, tokens

TOKENIZER = Path(__file__).resolve().parent.parent / "model" / "tokenizer"
DOCUMENTS = [tokens(12, 1), tokens(2, 2), tokens(30, 3), tokens(70, 4)]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
SHAPES = {
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "yarn": ("LlamaForCausalLM", {"rope_scaling": YARN, "rope_theta": 100.0}),
    "yarn2": ("Qwen2ForCausalLM", {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 16.0}, "qkv_bias": True}),
    "yarn3": ("Qwen3ForCausalLM", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}, "qk_norm": True}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 16}),
    "qwen3 uneven": ("Qwen3ForCausalLM", {"qk_norm": True, "num_attention_heads": 6, "head_dim": 6}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "qwen3_moe plain sum": ("Qwen3MoeForCausalLM", {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": False}),
    "qwen3_moe llama3": ("Qwen3MoeForCausalLM", {**EXPERTS, "rope_scaling": LLAMA3, "head_dim": 12}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", SHARED),
    "qwen2_moe biased": ("Qwen2MoeForCausalLM", {**SHARED, "qkv_bias": True, "norm_topk_prob": False}),
}


def lively(**changes) -> Decoder:
    """A decoder in which what would start as 0 or 1 is neither."""
    decoder = tiny(**changes)
    numbers = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=numbers)
    return decoder


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_opens_it_and_computes_the_same(tmp_path, name):
    from transformers import AutoModelForCausalLM

    family, changes = SHAPES[name]
    decoder = lively(**changes)
    export_model(tmp_path / "final", decoder, TOKENIZER)
    network, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert type(network).__name__ == family and not any(info.values()), info
    packed = logits_of(decoder, pack(DOCUMENTS)).split([len(document) - 1 for document in DOCUMENTS])
    for document, ours in zip(DOCUMENTS, packed, strict=True):
        with torch.no_grad():
            theirs = network.eval()(input_ids=document[None, :-1]).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.abs().max() > 1

    again = load_model(tmp_path / "final")
    assert isinstance(again, Decoder) and vars(again.config) == vars(decoder.config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), decoder.parameters(), strict=True))

    network.save_pretrained(tmp_path / "theirs")
    theirs = load_model(tmp_path / "theirs")
    assert isinstance(theirs, Decoder)
    assert torch.equal(logits_of(theirs, pack(DOCUMENTS)), logits_of(decoder, pack(DOCUMENTS)))


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe"])
def test_each_option_shows_in_the_logits(name):
    batch = pack(DOCUMENTS)
    with torch.no_grad():
        plain, changed = logits_of(tiny(), batch), logits_of(lively(**SHAPES[name][1]), batch)
    assert (plain - changed).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama3", "yarn", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe biased"])
def test_older_readers_find_what_they_need(name):
    family, changes = SHAPES[name]
    config = config_json(DecoderConfig(**changes), torch.float32)
    assert config["architectures"] == [family]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    assert config.get("rope_scaling", {"rope_type": "default"}) == scaling
    assert "qk_norm" not in config and config["head_dim"] == DecoderConfig(**changes).head_dim


def test_experts_stand_one_by_one_in_the_files(tmp_path):
    decoder = tiny(**SHARED)
    export_model(tmp_path / "final", decoder, TOKENIZER)
    stored = load_file(tmp_path / "final" / "model.safetensors")
    prefix, (layer, *_) = "model.layers.0.mlp", decoder.model.layers
    names = {name.removeprefix(f"{prefix}.") for name in stored if name.startswith(prefix)}
    one = {f"experts.{e}.{kind}_proj.weight" for e in range(4) for kind in ("gate", "up", "down")}
    shared = {f"shared_expert.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert names == {"gate.weight", "shared_expert_gate.weight", *one, *shared}
    assert torch.equal(stored[f"{prefix}.experts.2.up_proj.weight"], layer.mlp.experts.gate_up_proj[2, 24:])
    assert torch.equal(stored[f"{prefix}.experts.3.down_proj.weight"], layer.mlp.experts.down_proj[3])


def test_a_part_of_the_experts_is_read_alone(tmp_path):
    """As a process does that holds every third row of experts, and one that holds none."""
    from model.loading import fill_from_files

    decoder = tiny(**EXPERTS)
    export_model(tmp_path / "final", decoder, TOKENIZER)
    for first, end in ((0, 2), (2, 4), (4, 4)):
        held, skeleton = {}, load_skeleton(tmp_path / "final")
        shapes = {id(tensor): name for name, tensor in skeleton.named_parameters()}

        def part_of(tensor, held=held, shapes=shapes, first=first, end=end):
            name = shapes[id(tensor)]
            if name not in held:
                held[name] = torch.full((min(end, len(tensor)) - first, *tensor.shape[1:]), torch.nan)
            return held[name], (first, *[0] * (tensor.dim() - 1))

        fill_from_files(skeleton, tmp_path / "final", part_of)
        for name, parameter in decoder.named_parameters():
            assert torch.equal(held[name], parameter[first:end]), name


def test_what_two_regions_share():
    part = torch.zeros(2, 4)
    assert overlap(part, (3, 0), ()) == ((slice(0, 2), slice(0, 4)), (slice(3, 5), slice(0, 4)))
    assert overlap(part, (3, 0), (4,)) == ((slice(1, 2), slice(0, 4)), (slice(0, 4),))
    assert overlap(part, (3, 0), (0,))[0][0] == slice(0, 0)
    assert overlap(part, (3, 0), (4, slice(2, 6))) == ((slice(1, 2), slice(2, 4)), (slice(0, 2),))
    assert overlap(torch.zeros(()), (), ()) == ((), ()) and whole(torch.zeros(2))[1] == (0,)


# --- what is taken for one of the families


def saved(family: str, **changes) -> dict:
    """A config.json as transformers writes it."""
    import transformers

    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**shape, **changes})
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [f"{family}ForCausalLM"]}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe"])
def test_the_families_are_known_as_transformers_writes_them(family):
    config = saved(family)
    assert is_builtin(config)
    decoder = decoder_config(config)
    assert (decoder.qk_norm, decoder.qkv_bias) == ("Qwen3" in family, "Qwen2" in family)
    assert (decoder.num_experts is not None) == ("Moe" in family)
    assert decoder.num_experts is None or decoder.norm_topk_prob is False


def test_llama_as_it_lies_on_the_hub_is_known():
    scaling = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    config = saved("Llama") | {"rope_scaling": scaling, "rope_theta": 500000.0, "rope_parameters": None}
    assert is_builtin(config) and decoder_config(config).rope_scaling == scaling
    assert decoder_config(config).rope_theta == 500000.0
    old = config | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert decoder_config(old).rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"attention_bias": True}), ("Llama", {"mlp_bias": True}), ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"quantization_config": {"bits": 4}}), ("Llama", {"architectures": ["LlamaModel"]}),
        ("Llama", {"architectures": None}), ("Llama", {"model_type": "mistral"}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "warp": 1.0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), ("Llama", {"rope_parameters": 3}),
        ("Qwen2", {"use_sliding_window": True}), ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("Qwen2", {"num_key_value_heads": None}), ("Qwen3", {"attention_bias": True}), ("Qwen3", {"head_dim": None}),
        ("Qwen3Moe", {"decoder_sparse_step": 2}), ("Qwen3Moe", {"mlp_only_layers": [0]}),
        ("Qwen3Moe", {"num_experts": 0}), ("Qwen2Moe", {"shared_expert_intermediate_size": 0}),
        ("Mistral", {}), ("Mixtral", {}), ("Olmo2", {}),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute_is_left_to_transformers(family, changes):
    assert not is_builtin(saved(family) | changes)


def test_a_neighbour_of_the_families_runs_through_transformers(tmp_path):
    import transformers

    config = {name: value for name, value in saved("Qwen3Moe").items() if name != "architectures"}
    config |= {"mlp_only_layers": [1], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config)).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), HFCausalLM)


def test_shapes_that_nobody_could_open_are_named():
    for changes, message in (
        ({"qk_norm": True, "qkv_bias": True}, "none has both"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok needs num_experts"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than num_experts 2"),
        ({"num_experts": 4, "qk_norm": False}, "experts come with qk_norm"),
        ({**SHARED, "qk_norm": True}, "experts come with qk_norm"),
        ({"num_experts": -1}, "num_experts -1 is not positive"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type dynamic is none of linear, llama3, yarn",
        ),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be greater"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, "yarn needs original_max_position_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderConfig(**changes)
