"""Writes a model as a directory that transformers, and what reads its layout, opens without this project."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.decoder import Decoder, DecoderConfig
from model.families import config_json, unstacked
from model.generation_config import GENERATION_CONFIG, SPECIAL
from model.lora import Adapters, base_name, merge, write_adapters
from model.transformers_model import HFCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Config = dict[str, Any]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def export_model(
    directory: str | Path, model: Decoder | HFCausalLM, tokenizer: "str | Path | PreTrainedTokenizerFast", *,
    state_dict: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32, card: str = "",
    generation: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Publish `model` with its tokenizer as a Hugging Face directory, which is never seen half written.

    `state_dict` replaces the model's own weights (gathered from shards, or averaged). `tokenizer` is a directory, whose
    files are copied as they are, or a loaded tokenizer. `card` is the text of README.md. `generation` is what
    generation_config.json says, by itself the special tokens of the tokenizer and greedy decoding. Of a model with
    adapters the base with what they add is published, and beside it, in adapter/, they alone with the tokenizer.
    ValueError where their base has changed, and for weights that are beyond `dtype`.
    """
    directory = Path(directory).absolute()
    state_dict = model.state_dict() if state_dict is None else state_dict
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        _write_tokenizer(tokenizer, draft)
        generation = generation or {**_special_ids(draft), "do_sample": False}
        if model.adapters:
            state_dict = {name: tensor for name, tensor in state_dict.items() if base_name(name) is None}
            write_adapters(draft / "adapter", state_dict, model.adapters.config)
            _write_tokenizer(tokenizer, draft / "adapter")  # the base's own may have another chat template
            _write_json(draft / "adapter" / GENERATION_CONFIG, generation)
            model, state_dict = _with_adapters(model.adapters, state_dict, dtype)
        _refuse_overflow(state_dict, dtype)
        if isinstance(model, Decoder):
            config = _write_decoder(draft, model.config, state_dict, dtype)
        else:
            config = _write_transformers(draft, model, state_dict, dtype)
        special = {name: generation.get(name) for name in SPECIAL}
        _write_json(draft / "config.json", {**config, **special})
        _write_json(draft / GENERATION_CONFIG, generation)
        (draft / "README.md").write_text(card, encoding="utf-8")
        _publish(draft, directory)
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # libraries that are not Python have it in words only
        number = error.errno if isinstance(error, OSError) else told and int(told[1])
        if not number:
            raise
        needed = sum(tensor.numel() * dtype.itemsize for tensor in state_dict.values())
        free = shutil.disk_usage(directory.parent).free
        reason = f"{os.strerror(number)}: {directory}: {needed:,} bytes needed, {free:,} free"
        raise OSError(number, reason) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_overflow(weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    if dtype != torch.float16:  # the others reach as far as float32
        return
    largest = torch.finfo(dtype).max
    for name, weight in weights.items():
        if weight.isfinite().all() and (beyond := float(weight.abs().max())) > largest:
            raise ValueError(
                f"float16 ends at {largest:,.0f}, and {name} has {beyond:,.0f}: --export_dtype bfloat16 or float32; "
                "`python -m scripts.checkpoints export RUN --dtype bfloat16` makes a model of a checkpoint"
            )


def _with_adapters(
    adapters: Adapters, trained: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Decoder | HFCausalLM, dict[str, Tensor]]:
    """The base without memory for its weights, and these, read anew, with what the trained ones add."""
    if adapters.digest:
        adapters.check_base(adapters.digest)
    weights = adapters.load_base().state_dict()
    merge(weights, trained, adapters.config, dtype)
    return adapters.load_base(empty=True), weights


def _write_decoder(draft: Path, config: DecoderConfig, state_dict: dict[str, Tensor], dtype: torch.dtype) -> Config:
    """Write the weights; returns what its config.json says but for the special tokens."""
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    stored = unstacked({name: tensor for name, tensor in state_dict.items() if name not in skipped})
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in stored.items()}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    return config_json(config, dtype)


def _write_transformers(draft: Path, model: HFCausalLM, state_dict: dict[str, Tensor], dtype: torch.dtype) -> Config:
    """Write the weights; returns what its config.json says."""
    from transformers import GenerationConfig

    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in state_dict.items()}
    model.inner.generation_config = GenerationConfig()  # transformers refuses to write some that it reads
    model.inner.save_pretrained(draft, state_dict=weights)
    config: Config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads other names than transformers 5 writes, and where it finds none it takes defaults in silence.
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config


def _write_tokenizer(tokenizer: "str | Path | PreTrainedTokenizerFast", target: Path) -> None:
    if isinstance(tokenizer, str | Path):
        if not (Path(tokenizer) / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer} has no tokenizer.json")
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, target / name)
    else:
        tokenizer.save_pretrained(target)
    config_file = target / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    # transformers 5 writes a class name that 4.57 does not have, a list where that wants an object, and how it was
    # called itself; by itself 4.57 makes a third input that `generate` refuses.
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config["tokenizer_class"] == "PreTrainedTokenizerFast":
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    _write_json(config_file, config)


def _special_ids(directory: Path) -> dict[str, int | None]:
    """The ids of the bos, eos and pad tokens named by a directory's tokenizer files; null where they name none."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids: dict[str, int | None] = {}
    for name in SPECIAL:
        token = config.get(name.removesuffix("_id"))
        token = token["content"] if isinstance(token, dict) else token
        ids[name] = None if token is None else tokenizer.token_to_id(token)
    return ids


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _publish(draft: Path, directory: Path) -> None:
    """Flush a draft to the disk and give it its name; an earlier directory of that name steps aside, then goes.

    Between the two renames there is none of that name: no portable call swaps two directories.
    """
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
        _fsync(path)
    _fsync(draft)
    previous = directory.with_name(f".old-{directory.name}-{os.getpid()}")
    if directory.exists():
        directory.rename(previous)
    try:
        draft.rename(directory)
    except OSError:
        if previous.exists():
            previous.rename(directory)
        raise
    _fsync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
