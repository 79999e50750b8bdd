"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen layer W x gets + alpha / rank x B (A x), and A and B are trained.

peft lays them beside the layers of any model. A layer `x` then stands as `x.base_layer`, its matrices as
`x.lora_A.default` and `x.lora_B.default`; here is all that knows these names. peft is imported where adapters are
wanted and nowhere else, since it takes a second.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.partial_weights import PartOf, block, whole

logger = logging.getLogger("train")

# Linear layers whose weight a state-space mixer reads itself, so that an adapter there would do nothing.
READ_PAST = ("out_proj", "dt_proj")


@dataclass
class Adapters:
    """What a model with adapters knows of them."""

    config: Any  # peft's LoraConfig
    load_base: Callable[..., Any]  # the model without adapters, from where its weights came; `empty` as choose_model's
    files: Callable[[], list[Path]]  # those weights
    left_out: list[str]  # what could not be adapted
    digest: str = ""  # of the base's weight files when they were read; empty where they were not

    def check_base(self, digest: str) -> None:
        """Raises ValueError unless the base's files are still those with that digest."""
        if digest_of(self.files()) != digest:
            base = self.config.base_model_name_or_path
            raise ValueError(f"the weights in {base} are no longer those that the adapters were trained on")

    def describe(self) -> str:
        config = self.config
        targets = "+".join(sorted(config.target_modules))
        said = f"LoRA rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on {targets}"
        return f"{said} of base weights {self.digest}"


def base_name(name: str) -> str | None:
    """The name of a weight in the model without adapters, None for one of an adapter."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def add_adapters(
    model: Any, base: str, load_base: Callable[..., Any], files: Callable[[], list[Path]], rank: int, alpha: int,
    targets: str, dropout: float,
) -> None:  # fmt: skip
    """Freeze a model and lay adapters, whose weights are unset, beside the linear layers that `targets` names.

    Raises ValueError for a target that is none, and for a rank that a layer is too narrow for.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D  # a linear layer with its weight the other way round

    vocabulary = [id(module) for module in model.vocabulary_modules()]
    layers = {name: each for name, each in model.named_modules() if id(each) not in vocabulary}
    linear = {name: each for name, each in layers.items() if isinstance(each, nn.Linear | Conv1D)}
    linear = {name: each for name, each in linear.items() if f"{name}.weight" not in model.unreached}
    past = [name for name in linear if is_read_past(model, name)]
    shapes = {name: tuple(each.weight.shape) for name, each in linear.items() if name not in past}
    chosen, left_out = choose_layers(shapes, rank, targets)
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() > 2]
    left_out += past + [name for name in stacked if name not in model.unreached]
    endings = {last_name(name) for name in chosen}
    alike = [name for name, _ in model.named_modules() if last_name(name) in endings]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", base_model_name_or_path=base,
        target_modules=sorted(endings) if alike == chosen else chosen,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in chosen), inference_mode=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # peft draws what `fill_adapters` draws anew
        inject_adapter_in_model(config, getattr(model, "inner", model))
    for name, parameter in model.named_parameters():
        if base_name(name) is None:
            parameter.data = parameter.data.float()  # also where the base is bfloat16
    model.adapters = Adapters(config, load_base, files, patterns(left_out) if not targets else [])


def choose_layers(linear: Mapping[str, tuple[int, ...]], rank: int, targets: str) -> tuple[list[str], list[str]]:
    """Of the linear layers with these shapes those whose names end as `targets` says, or all; and what is left of all.

    What is narrower than the rank is left out where it was not named. Raises ValueError as `add_adapters`.
    """
    endings = [each.strip() for each in targets.split(",") if each.strip()]
    chosen = [name for name in linear if not endings or any(f".{name}".endswith(f".{each}") for each in endings)]
    if unknown := [each for each in endings if not any(f".{name}".endswith(f".{each}") for name in chosen)]:
        known = ", ".join(sorted({last_name(name) for name in linear}))
        raise ValueError(f"--lora_targets {', '.join(unknown)}: no linear layer of this model; there are {known}")
    wide = [name for name in chosen if rank <= min(linear[name])]
    if not wide or (endings and wide != chosen):
        sizes = {patterns([name])[0]: min(linear[name]) for name in chosen if name not in wide}
        said = ", ".join(f"{name} has {size}" for name, size in sizes.items()) or "there are none"
        raise ValueError(f"--lora_rank {rank}: no more than the rows and columns of each layer, and {said}")
    return wide, [name for name in chosen if name not in wide]


def is_read_past(model: nn.Module, name: str) -> bool:
    mixer = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
    return last_name(name) in READ_PAST and "mamba" in mixer


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def patterns(names: Iterable[str]) -> list[str]:
    """The names with a star for each number, every one once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


@torch.no_grad()
def fill_adapters(model: Any, seed: int, part_of: PartOf = whole) -> None:
    """Set the adapters of a model whose own weights are read: A is drawn from the seed alone, B is 0.

    A: uniform(-1, 1) / sqrt(inputs), as peft draws it. Of a tensor that is shared out the part held here is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if base_name(name) is None:
            part, begin = part_of(parameter)
            bound = 0.0 if ".lora_B." in name else parameter.shape[1] ** -0.5
            drawn = torch.empty(parameter.shape).uniform_(-1.0, 1.0, generator=generator) * bound
            part.copy_(drawn[block(part, begin)])
    model.adapters.digest = digest_of(model.adapters.files())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info("LoRA: %s of %s weights are trained (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    if model.adapters.left_out:
        logger.warning("LoRA: frozen and without adapters: %s", ", ".join(model.adapters.left_out))


def digest_of(files: Iterable[Path]) -> str:
    """What tells the content of some files from any other, whatever directory they are in."""

    def one(file: Path) -> bytes:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter's lock
        return hashlib.sha256(b"".join(threads.map(one, files))).hexdigest()[:32]


def merge(weights: dict[str, Tensor], adapters: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> None:
    """Put W + alpha / rank x B A, computed in float64 and rounded once, in the place of each weight W with adapters."""
    for name, a in adapters.items():
        layer, is_a, rest = name.partition(".lora_A.")
        if is_a:
            added = adapters[f"{layer}.lora_B.{rest}"].double() @ a.double() * (config.lora_alpha / config.r)
            weight = weights[f"{layer}.weight"].double()
            weights[f"{layer}.weight"] = (weight + (added.t() if config.fan_in_fan_out else added)).to(dtype)


def write_adapters(directory: Path, adapters: Mapping[str, Tensor], config: Any) -> None:
    """Write them into a new directory that `PeftModel.from_pretrained(base, directory)` opens, in their own dtype."""
    directory.mkdir()
    said = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    text = json.dumps({**said, "inference_mode": True}, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(f"{text}\n", encoding="utf-8")
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()}
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
