"""Where an exported model stops: the generation config of its base, and the ends that its answers were trained with."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.trust import NO_TRUST, Trust, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.build import ModelRequest

logger = logging.getLogger(__name__)
GENERATION_CONFIG = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_config(
    request: "ModelRequest", tokenizer: "PreTrainedTokenizerFast", end_ids: Collection[int], end_texts: Sequence[str]
) -> dict[str, Any]:
    """The generation_config.json of what is trained from the wanted model.

    All that the base says is kept, its sampling too. `eos_token_id` is what the base stops at, and after that
    `end_ids`, with which answers are trained to end; `end_texts` are where a chat template closes turns by text, and
    go to `stop_strings`. An id of the base that is no added token of the tokenizer is an ordinary word there and left
    out. ValueError where the base's file says what no reader takes.
    """
    said = _said_by(request.from_weight, request.trust_in(request.from_weight))
    own, known = _own_tokens(tokenizer, request), tokenizer.get_added_vocab()
    texts = {number: text for text, number in _added(own).items()}
    for name in SPECIAL:
        if name in said:  # ids of the base, and by their texts those of another tokenizer
            ids = _ids(said[name])
            said[name] = [known[texts[token]] for token in ids if texts.get(token) in known] if own else ids
    special = tokenizer.added_tokens_decoder.keys()
    stops = [*said.get("eos_token_id", ()), *_ids(tokenizer.eos_token_id), *sorted(end_ids)]
    kept = [token for token in dict.fromkeys(stops) if token in special or token in end_ids]
    config = {**said, "eos_token_id": kept[0] if len(kept) == 1 else kept or None}
    for name, own in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        config[name] = next((token for token in said.get(name, ()) if token in special), own)
    if texts := [*said.get("stop_strings", ()), *end_texts]:
        config["stop_strings"] = list(dict.fromkeys(texts))
    return config


def check_base(request: "ModelRequest", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Before training: refuse what `generation_config` would refuse after it; warn of ids that have other meanings."""
    _said_by(request.from_weight, request.trust_in(request.from_weight))
    own = _own_tokens(tokenizer, request)
    moved, count = _moved(own, tokenizer) if own else (0, 0)
    if moved:
        logger.warning(
            "%d of the %d tokens of %s are other ones in %s: the model has to learn these anew",
            moved, count, request.from_weight, tokenizer.name_or_path,
        )  # fmt: skip


def stop_ids(directory: Path) -> list[int]:
    """The tokens at which an exported model stops."""
    return _ids(_said_by(str(directory), NO_TRUST).get("eos_token_id"))


def _said_by(from_weight: str, trust: Trust) -> dict[str, Any]:
    """What a base says of generation; where it has no file for that, the tokens in its config.json."""
    if from_weight == "none":
        return {"do_sample": False}
    if said := read_json(from_weight, GENERATION_CONFIG, trust):
        said = {name: value for name, value in said.items() if name != "transformers_version"}
        file = GENERATION_CONFIG
    else:
        config, file = read_json(from_weight, "config.json", trust), "config.json"
        said = {name: config[name] for name in SPECIAL if name in config}
    for name in SPECIAL:
        several = isinstance(said.get(name), list) and name == "eos_token_id"
        if not all(type(token) in (int, type(None)) for token in (said[name] if several else [said.get(name)])):
            ids = "a token's id or a list of them" if name == "eos_token_id" else "a token's id"
            raise ValueError(f"{from_weight}/{file}: {name} must be {ids}, found {said[name]!r}")
    if "stop_strings" in said:
        texts = said["stop_strings"] or []
        said["stop_strings"] = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, str | list) or not all(isinstance(text, str) for text in said["stop_strings"]):
            raise ValueError(f"{from_weight}/{file}: stop_strings must be texts, found {texts!r}")
    return said


def _own_tokens(tokenizer: "PreTrainedTokenizerFast", request: "ModelRequest") -> dict[str, Any]:
    """tokenizer.json of the base where the tokenizer is another one, else nothing."""
    source = request.from_weight
    if source == "none" or tokenizer.name_or_path == source:
        return {}
    return read_json(source, "tokenizer.json", request.trust_in(source))


def _added(own: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in own.get("added_tokens", ())}


def _moved(own: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    """How many tokens of the base have another id in this tokenizer or none, and how many it has."""
    pieces, here = own.get("model", {}).get("vocab", {}), tokenizer.get_vocab()
    words = pieces if isinstance(pieces, dict) else {piece[0]: number for number, piece in enumerate(pieces)}
    words = {**words, **_added(own)}
    return sum(here.get(text) != number for text, number in words.items()), len(words)


def _ids(value: int | list[int] | None) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if token is not None]
