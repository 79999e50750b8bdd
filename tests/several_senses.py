"""Tiny models that read text and images, as transformers makes and saves them."""

from collections.abc import Callable
from typing import Any

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
OF_QWEN = {
    "depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
    "fullatt_block_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LINEAR = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
LINEAR |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
# family -> what its text and its vision part differ in, and the rest of its configuration
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({"sliding_window": 64}, IMAGE, {"mm_tokens_per_image": 1}),
    "Llava": ({"model_type": "llama"}, {**IMAGE, "model_type": "siglip_vision_model"}, {}),
    "Mistral3": ({"model_type": "mistral"}, {**IMAGE, "model_type": "pixtral", "head_dim": 8}, {}),
    "Qwen2_5_VL": (MROPE, OF_QWEN, {}),
    "Qwen3_5": (LINEAR, OF_QWEN, {}),
    "PaliGemma": ({"model_type": "gemma"}, {**IMAGE, "model_type": "siglip_vision_model"}, {}),
    "Llama4": (
        {"intermediate_size_mlp": 48, "num_local_experts": 2},
        {**IMAGE, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}, {},
    ),
}  # fmt: skip


def seeing(directory: Any, family: str = "Gemma3", **changes: Any) -> Any:
    """Such a model with random weights; `changes` are of its text part."""
    import torch
    import transformers

    text, image, more = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, **text, **changes}, vision_config=image, tie_word_embeddings=False, **more
    )
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, f"{family}ForConditionalGeneration")
    network = make(config)
    network.save_pretrained(directory)
    return network.eval()
