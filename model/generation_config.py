"""Where an exported model stops: the generation config of its base, and the ends that its answers were trained with."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.trust import NO_TRUST, Trust, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.choose import ModelRequest

GENERATION_CONFIG = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_config(
    request: "ModelRequest", tokenizer: "PreTrainedTokenizerFast", end_ids: Collection[int], end_texts: Sequence[str]
) -> dict[str, Any]:
    """The generation_config.json of what was trained from the wanted model.

    All that the base says is kept, its sampling too. `eos_token_id` is what the base stops at, and after that
    `end_ids`, with which answers were trained to end; `end_texts` are where a chat template closes turns by text, and
    go to `stop_strings`. An id of the base that is no added token of the tokenizer is an ordinary word there and left
    out.
    """
    said = _said_by(request.from_weight, request.trust_in(request.from_weight))
    special = tokenizer.added_tokens_decoder.keys()
    stops = [*_ids(said.get("eos_token_id")), *_ids(tokenizer.eos_token_id), *sorted(end_ids)]
    kept = [token for token in dict.fromkeys(stops) if token in special or token in end_ids]
    config = {**said, "eos_token_id": kept[0] if len(kept) == 1 else kept or None}
    for name, own in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        config[name] = said[name] if said.get(name) in special else own
    if texts := [*(said.get("stop_strings") or []), *end_texts]:
        config["stop_strings"] = list(dict.fromkeys(texts))
    return config


def stop_ids(directory: Path) -> list[int]:
    """The tokens at which an exported model stops."""
    return _ids(_said_by(str(directory), NO_TRUST).get("eos_token_id"))


def _said_by(from_weight: str, trust: Trust) -> dict[str, Any]:
    """What a base says of generation; where it has no file for that, the tokens in its config.json."""
    if from_weight == "none":
        return {"do_sample": False}
    if said := read_json(from_weight, GENERATION_CONFIG, trust):
        return {name: value for name, value in said.items() if name != "transformers_version"}
    config = read_json(from_weight, "config.json", trust)
    return {name: config[name] for name in SPECIAL if name in config}


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
