"""Which families of transformers the decoder is: their config.json, and the names of the weights in their files."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from model.decoder import DecoderConfig
from model.partial_weights import Inside
from model.rope import scaling_in

# architecture -> model_type, and what its config.json must say where LlamaConfig's defaults are not its own.
FAMILIES = {
    "LlamaForCausalLM": ("llama", ()),
    "Qwen2ForCausalLM": ("qwen2", ("num_key_value_heads", "max_position_embeddings")),
    "Qwen3ForCausalLM": ("qwen3", ("num_key_value_heads", "max_position_embeddings", "head_dim")),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        ("num_key_value_heads", "max_position_embeddings", "num_experts", "num_experts_per_tok",
         "moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        ("num_key_value_heads", "max_position_embeddings", "head_dim", "num_experts", "num_experts_per_tok",
         "moe_intermediate_size"),
    ),
}  # fmt: skip
# What makes a model of these families another network than the decoder, unless it is absent or false. The bias of
# Qwen2-MoE has a name of its own; Llama and Qwen3 would put one on the output projection too.
FOREIGN_OPTIONS = ("attention_bias", "mlp_bias", "quantization_config", "use_sliding_window", "mlp_only_layers")


def family_of(config: DecoderConfig) -> str:
    """The architecture that computes what a decoder of this shape does."""
    if config.num_experts is not None:
        return "Qwen3MoeForCausalLM" if config.qk_norm else "Qwen2MoeForCausalLM"
    return "Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"


def is_builtin(config: dict[str, Any]) -> bool:
    """Whether a config.json describes what the decoder computes, and says all that it has to."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        return False
    config = _in_one_voice(config)
    model_type, needed = FAMILIES[architectures[0]]
    layer_types = config.get("layer_types") or []
    try:
        scaling_in(_rope_in(config))
    except (TypeError, ValueError, AttributeError):  # of the files of strangers
        return False
    return (
        config.get("model_type", model_type) == model_type
        and config.get("hidden_act", "silu") == "silu"
        and config.get("decoder_sparse_step", 1) == 1
        and config.get("partial_rotary_factor", 1.0) == 1.0
        and not any(config.get(name) for name in FOREIGN_OPTIONS)
        and all(kind == "full_attention" for kind in layer_types)
        and all(config.get(name) for name in needed)
    )


def decoder_config(config: dict[str, Any], dropout: float = 0.0) -> DecoderConfig:
    """The shape in a config.json that `is_builtin` accepts, with its family's defaults for what it leaves out.

    Raises ValueError for a shape that is incomplete or impossible.
    """
    config = _in_one_voice(config)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise ValueError(f"config.json has no whole number for {', '.join(missing)}")
    values: dict[str, Any] = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "num_key_value_heads": config["num_attention_heads"],
    }
    (family,) = config["architectures"]
    experts = "Moe" in family
    known = {field.name for field in fields(DecoderConfig)} - {"qk_norm", "qkv_bias"}
    known -= set() if experts else {name for name in known if "expert" in name or name.startswith(("moe_", "norm_"))}
    known -= {"shared_expert_intermediate_size"} if family == "Qwen3MoeForCausalLM" else set()
    values |= {name: value for name, value in config.items() if name in known and value is not None}
    rope = _rope_in(config)
    values |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": scaling_in(rope), "dropout": dropout}
    values["qk_norm"] = "Qwen3" in family
    values["qkv_bias"] = family == "Qwen2ForCausalLM" or experts and "Qwen2" in family and config.get("qkv_bias", True)
    if experts:
        values["norm_topk_prob"] = bool(config.get("norm_topk_prob", False))
    return DecoderConfig(**values)


def _in_one_voice(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes the number of Qwen3-MoE's experts under another name than the files on the Hub have."""
    return {"num_experts": config["num_local_experts"], **config} if "num_local_experts" in config else config


def _rope_in(config: dict[str, Any]) -> dict[str, Any]:
    """Theta and scaling, where transformers 5 has them or where older versions had them."""
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**theta, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}


def config_json(config: DecoderConfig, dtype: torch.dtype) -> dict:
    """The config.json of a decoder as a model of its family, readable by transformers 5 and 4.57; no special tokens."""
    family, dtype_name = family_of(config), str(dtype).removeprefix("torch.")
    shape = {name: value for name, value in config.to_dict().items() if name not in ("qk_norm", "qkv_bias")}
    scaling = config.rope_scaling or {"rope_type": "default"}
    llama = {"mlp_bias": False, "pretraining_tp": 1}
    options: dict[str, Any] = llama if family == "LlamaForCausalLM" else {"use_sliding_window": False}
    if config.num_experts is None:
        options |= {} if config.qkv_bias else {"attention_bias": False}
    else:
        options |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": config.norm_topk_prob}
        options |= {"attention_bias": False} if config.qk_norm else {"qkv_bias": config.qkv_bias}
    return {
        "architectures": [family],
        "model_type": FAMILIES[family][0],
        **shape,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **options,
        "use_cache": True,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def in_files(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Inside]]:
    """The tensors in the files that hold a weight of the decoder: their names, and the part of it that each is.

    All but one weight stand there as they are; the experts are stacked here and stand one by one in the files.
    """
    prefix, _, kind = name.rpartition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        yield name, ()
        return
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield f"{prefix}.experts.{expert}.down_proj.weight", (expert,)
        else:
            half = shape[1] // 2
            yield f"{prefix}.experts.{expert}.gate_proj.weight", (expert, slice(0, half))
            yield f"{prefix}.experts.{expert}.up_proj.weight", (expert, slice(half, 2 * half))


def unstacked(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a decoder as they stand in files."""
    return {
        stored: tensor[part]
        for name, tensor in state_dict.items()
        for stored, part in in_files(name, tuple(tensor.shape))
    }
