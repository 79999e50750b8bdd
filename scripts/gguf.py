"""Writes an exported model as one GGUF file, the format of llama.cpp and what is built on it.

What the built-in decoder computes is written, as the architectures of llama.cpp that compute the same; what one of them
would compute otherwise is refused, since a wrong file answers almost as well as a right one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dataset.chat import ChatRenderer
from dataset.tokenizer import vocabulary_size
from model.decoder import Decoder, DecoderConfig
from model.families import family_of
from model.rope import rotary_frequencies

DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen2MoeForCausalLM": gguf.MODEL_ARCH.QWEN2MOE,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
}
STOCK = "convert_hf_to_gguf.py of llama.cpp may know it"
WORDS = (
    r"Split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp calls a way to cut text -> its steps, and whether a piece that is a token is taken without merging.
PRE_TOKENIZERS = {
    "gpt-2": (["ByteLevel regex"], False),
    "smollm": (["Digits one by one", "ByteLevel regex"], False),
    "qwen2": ([WORDS.replace("NUMBER", r"\p{N}"), "ByteLevel"], False),
    "llama-bpe": ([WORDS.replace("NUMBER", r"\p{N}{1,3}"), "ByteLevel"], True),
}


def write_gguf(
    path: Path, model: Decoder, tokenizer: PreTrainedTokenizerFast, name: str, dtype: str, stops: Sequence[int] = ()
) -> list[int]:
    """Publish `model` with its tokenizer under `path`, whole or not at all; `dtype` is one of DTYPES.

    `stops`: the tokens that end an answer, as in the generation config of the model; returns those for which the format
    has no place.

    Raises ValueError where llama.cpp would compute, or cut text, otherwise.
    """
    config = model.config
    if problems := [*shape_problems(config), *tokenizer_problems(tokenizer, config.vocab_size)]:
        raise ValueError("; ".join(problems))
    architecture, (kind, file_type) = ARCHITECTURES[family_of(config)], DTYPES[dtype]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    writer = gguf.GGUFWriter(draft, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe_shape(writer, config)
        unplaced = _describe_tokenizer(writer, tokenizer, config.vocab_size, stops)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        tensors = [(_name_in(names, name), tensor) for name, tensor in _tensors_of(model)]
        kinds = [_kind_of(name, tensor, kind) for name, tensor in tensors]
        for (name, tensor), kept in zip(tensors, kinds, strict=True):
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kept)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, tensor), kept in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_stored(name, tensor, kept))
        writer.flush()
        for file in writer.fout or []:
            os.fsync(file.fileno())
        writer.close()
        draft.replace(path)
        return unplaced
    except OSError as error:  # numpy's says neither where nor why
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno or errno.EIO, f"{path} cannot be written ({error}), {free:,} bytes are free"
        ) from error
    finally:
        writer.close()
        draft.unlink(missing_ok=True)


def shape_problems(config: DecoderConfig) -> list[str]:
    """What of a shape llama.cpp would compute otherwise."""
    family, scaling, problems = family_of(config), config.rope_scaling or {}, []
    if scaling.get("rope_type") == "llama3" and family != "LlamaForCausalLM":
        problems.append(f"llama.cpp has no llama3 positions in {family}")
    if not scaling.get("truncate", True):
        problems.append("llama.cpp rounds the ramp of yarn, this model does not (truncate false)")
    if config.num_experts is not None and config.norm_topk_prob != (family == "Qwen3MoeForCausalLM"):
        normalises = "does not let" if config.norm_topk_prob else "lets"
        problems.append(f"llama.cpp {normalises} the weights of a token's experts add up to 1 in {family}")
    return problems


def _describe_shape(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.num_experts is not None:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.shared_expert_intermediate_size is not None:
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))
        size = rotary_frequencies(config.head_dim, config.rope_theta, scaling)[1]
        # llama.cpp multiplies by the size that the paper has for this factor, and by this.
        writer.add_rope_scaling_attn_factors(size / (1 + 0.1 * np.log(scaling["factor"])))


def _tensors_of(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of transformers, in the order and the parts that llama.cpp has them in."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        tensor, module = parameter.detach(), name.split(".")[-2]
        if name.endswith(".experts.gate_up_proj"):
            for part, values in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), values
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", tensor
        elif module == "shared_expert_gate":
            yield name, tensor.squeeze(0)
        elif module in heads and family_of(config) == "LlamaForCausalLM":
            # There the architecture turns neighbours (2i, 2i + 1), not the pairs (i, i + head_dim / 2).
            yield name, tensor.unflatten(0, (heads[module], 2, -1)).transpose(1, 2).flatten(0, 2)
        else:
            yield name, tensor
    if config.tie_word_embeddings and family_of(config) == "Qwen2MoeForCausalLM":
        yield "lm_head.weight", model.lm_head.weight.detach()  # there the architecture knows no tied head
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain, _ = rotary_frequencies(config.head_dim, config.rope_theta)
        stretched, _ = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", plain / stretched


def _name_in(names: gguf.TensorNameMap, name: str) -> str:
    known = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert known is not None or name == "rope_freqs.weight", name
    return known or name


def _kind_of(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors and routers stay in float32; rows that no blocks fill are kept in float16, as llama.cpp does."""
    if tensor.dim() == 1 or ".ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return GGMLQuantizationType.F16 if tensor.shape[-1] % block else kind


def _stored(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    values = tensor.to("cpu", torch.float32).contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} holds numbers that float16 has not: give --dtype bf16 or f32")
    return gguf.quantize(values, kind)


def tokenizer_problems(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[str]:
    """What of a tokenizer llama.cpp would do otherwise."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    problems = []
    if (needed := vocabulary_size(tokenizer)) > vocab_size:
        problems.append(f"the tokenizer has {needed} entries, the vocabulary of the model {vocab_size}")
    if parts["model"]["type"] != "BPE" or pre_tokenizer_of(parts) is None:
        known = ", ".join(PRE_TOKENIZERS)
        problems.append(f"the tokenizer cuts text in a way that is none of llama.cpp's {known}; {STOCK}")
    elif tokenizer.eos_token_id is None:
        problems.append("the tokenizer names no eos_token")
    elif adds_bos(tokenizer) is None:
        problems.append(f"the tokenizer adds more to a text than a first token; {STOCK}")
    return problems


def pre_tokenizer_of(parts: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a tokenizer.json cuts text, None for one that it is not known to have."""
    model, pre = parts["model"], parts["pre_tokenizer"] or {"type": None}
    steps = [_step(step) for step in pre.get("pretokenizers", [pre])]
    plain = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    plain &= not model.get("byte_fallback") and (parts["decoder"] or {}).get("type") == "ByteLevel"
    plain &= not any(token[side] for token in parts["added_tokens"] for side in ("lstrip", "rstrip", "single_word"))
    # llama.cpp does not compose characters; what is typed is composed already.
    plain &= parts["normalizer"] in (None, {"type": "NFC"})
    whole_words = bool(model.get("ignore_merges"))
    return next((name for name, known in PRE_TOKENIZERS.items() if plain and known == (steps, whole_words)), None)


def _step(step: dict[str, Any]) -> str:
    """A step of cutting text in words that hold all that matters of it."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel regex" if step["use_regex"] else "ByteLevel"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return f"Split {step['pattern'].get('Regex')}"
    return "Digits one by one" if step == {"type": "Digits", "individual_digits": True} else json.dumps(step)


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool | None:
    """Whether encoding begins with the beginning-of-sequence token; None where it adds something else."""
    text, whole = (tokenizer("x", add_special_tokens=special).input_ids for special in (False, True))
    return whole != text if whole in (text, [tokenizer.bos_token_id, *text]) else None


def _describe_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, stops: Sequence[int]
) -> list[int]:
    """Returns the stops for which there is no place beside eos, end of turn and end of message."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {id: text for text, id in parts["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in parts["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(pre_tokenizer_of(parts)))
    writer.add_token_list([texts.get(id, f"[PAD{id}]") for id in range(vocab_size)])
    writer.add_token_types([kinds.get(id, gguf.TokenType.UNUSED) for id in range(vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]])
    eos = tokenizer.eos_token_id
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id)  # else it takes id 11
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(adds_bos(tokenizer)))
    if not tokenizer.chat_template:
        return []
    template = tokenizer.chat_template
    if not isinstance(template, str):
        template = [{"name": name, "template": text} for name, text in template.items()]
    writer.add_chat_template(template)
    end_of_turn = tokenizer.convert_tokens_to_ids(ChatRenderer(tokenizer).end_of_turn)
    more = [token for token in dict.fromkeys([end_of_turn, *stops]) if token != eos]  # the likeliest first
    places = (writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(places, more, strict=False):
        add(token)
    return more[len(places) :]
