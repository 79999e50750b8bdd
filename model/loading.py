"""From a configuration or a directory of weights to a model that answers `model(batch, terms)`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.decoder import Decoder, DecoderConfig
from model.families import decoder_config, in_files, is_builtin
from model.isolation import check_isolation
from model.lora import base_name
from model.partial_weights import Inside, PartOf, overlap, whole
from model.quantised import TRAINABLE, refuse_quantised
from model.reach import freeze_unreached
from model.transformers_model import COMPUTED, HFCausalLM
from model.trust import NO_TRUST, Trust, read_object, refuse_unsafe_weights
from model.vocabulary import grow, mean_row, vocabulary_tensors

logger = logging.getLogger("train")


def build_skeleton(config: DecoderConfig) -> Decoder:
    """A decoder on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return Decoder(config)


def build_model(config: DecoderConfig, seed: int, init: str = "fan_in") -> Decoder:
    """A float32 decoder on the CPU whose weights depend on the configuration, the seed and `init` alone."""
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(seed), init=init)
    return decoder


def load_model(source: str | Path, dropout: float = 0.0, trust: Trust = NO_TRUST) -> Decoder | HFCausalLM:
    """The weights of a directory or a Hub id, in the built-in decoder where it fits and through transformers else.

    They are float32, or of the type of `weights_in` around the call, and are read right into it. `dropout` is the
    decoder's; other models keep what their own config.json says. Raises ValueError for weights that do not fit their
    config.json and for families whose packed documents would influence each other; UnsafeModelError for what is a
    program.
    """
    if is_builtin_directory(source, trust):
        decoder = Decoder(_decoder_config_in(source, dropout))
        fill_from_files(decoder, source)
        return decoder
    model = HFCausalLM.from_pretrained(source, trust)
    freeze_unreached(model, check_isolation(model, torch.get_default_dtype()))
    return model


def load_skeleton(source: str | Path, dropout: float = 0.0, trust: Trust = NO_TRUST) -> Decoder | HFCausalLM:
    """The model of `load_model` without memory for its weights; once it has some, `fill_from_files` sets them."""
    if is_builtin_directory(source, trust):
        return build_skeleton(_decoder_config_in(source, dropout))
    model = HFCausalLM.skeleton(source, trust)
    freeze_unreached(model)
    return model


def refuse_missing(source: str | Path) -> None:
    """Raises ValueError for a path where nothing is; what could be an id of the Hub is none."""
    if not Path(source).is_dir() and (str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))):
        raise ValueError(f"no model in {source}: there is no such directory")


def is_builtin_directory(source: str | Path, trust: Trust = NO_TRUST) -> bool:
    """Whether the built-in decoder computes what lies there. Raises ValueError where nothing does."""
    refuse_missing(source)
    refuse_unsafe_weights(source, trust)
    refuse_quantised(source, trust)
    return (Path(source) / "config.json").is_file() and is_builtin(read_config(source))


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a directory; ValueError where it is no JSON object."""
    return read_object(Path(directory) / "config.json")


def _decoder_config_in(directory: str | Path, dropout: float) -> DecoderConfig:
    try:
        return decoder_config(read_config(directory), dropout)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


@dataclass
class Stored:
    """A tensor in the files of a model, and what it is there."""

    tensor: Tensor
    inside: Inside  # where in the tensor
    shape: tuple[int, ...]  # in the file
    added: int = 0  # rows of a grown vocabulary, behind those of the file


def fill_from_files(
    model: Decoder | HFCausalLM, source: str | Path, part_of: PartOf = whole, trust: Trust = NO_TRUST
) -> None:
    """Read the weights of a directory or a Hub id into a model, of each tensor only the part that is held here.

    Raises ValueError where the files are damaged or do not fit the model, naming the first differences.
    """
    wanted = _wanted_tensors(model)
    tied = {base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    missing, wrong = _as_in_files(model, wanted), []
    for file in weight_files(source, trust):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in tied:
                    continue  # some writers save the tied head a second time
                if name not in missing and COMPUTED.search(name):
                    continue  # and older ones what the model computes
                stored, values = missing.pop(name, None), opened.get_slice(name)
                if stored is None:
                    wrong.append(f"{name} is not part of it")
                elif problem := _problem(stored, values):
                    wrong.append(f"{name} {problem}")
                else:
                    _copy(values if stored.shape else opened.get_tensor(name), stored, part_of)
    wrong += [f"{name} is missing" for name in missing]
    if wrong and isinstance(model, HFCausalLM):  # the family stores its weights otherwise than it holds them
        _convert(model, wanted, source, part_of, trust)
    elif wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights in {source} do not fit its config.json: {'; '.join(wrong[:5])}{more}")


def _wanted_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the files have to hold: parameters, a tied one once, and persistent buffers, none of them of adapters."""
    parameters = dict(model.named_parameters())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
    return {own: tensor for name, tensor in {**parameters, **buffers}.items() if (own := base_name(name))}


def _as_in_files(model: Decoder | HFCausalLM, wanted: dict[str, Tensor]) -> dict[str, Stored]:
    """What the files of a model have to hold, under the names that it has there."""
    found, grown = {}, vocabulary_tensors(model) if model.added_entries else []
    for name, tensor in wanted.items():
        if any(tensor is table for table in grown):
            rows = len(tensor) - model.added_entries
            found[name] = Stored(tensor, (slice(0, rows),), (rows, *tensor.shape[1:]), model.added_entries)
            continue
        shape = tuple(tensor.shape)
        for stored, inside in in_files(name, shape) if isinstance(model, Decoder) else [(name, ())]:
            found[stored] = Stored(tensor, inside, tuple(torch.empty(shape, device="meta")[inside].shape))
    return found


def _problem(stored: Stored, values: Any) -> str | None:
    """What is wrong with a slice of a file, None if nothing is."""
    shape, dtype = tuple(values.get_shape()), values.get_dtype()
    if shape != stored.shape:
        return f"is {shape} and should be {stored.shape}"
    if stored.tensor.is_floating_point() and dtype not in TRAINABLE:
        return f"holds {dtype}, not one of {', '.join(TRAINABLE)}"
    return None


def _copy(values: Any, stored: Stored, part_of: PartOf) -> None:
    """Set what the values, a tensor or a slice of a file, say of a tensor; added rows become the mean of the others."""
    _put(values, stored.tensor, stored.inside, part_of)
    if stored.added:
        rows, *columns = stored.shape
        mean = mean_row(values, rows).expand(stored.added, *columns)
        _put(mean, stored.tensor, (slice(rows, rows + stored.added),), part_of)


def _put(values: Any, tensor: Tensor, inside: Inside, part_of: PartOf) -> None:
    """Copy of the values that belong `inside` a tensor what is held here."""
    part, begin = part_of(tensor)
    in_part, in_values = overlap(part, begin, inside)
    if (own := part.detach()[in_part]).numel():
        own.copy_(values[in_values])


def _convert(model: HFCausalLM, wanted: dict[str, Tensor], source: str | Path, part_of: PartOf, trust: Trust) -> None:
    """Fill a model from another one that transformers has read, which knows how the family stores its weights."""
    logger.warning("the weights of %s have to be converted: every process holds a full copy for a moment", source)
    whole_model = HFCausalLM.from_pretrained(source, trust)
    grow(whole_model, model.vocab_size)
    converted = whole_model.inner.state_dict()
    for name, tensor in wanted.items():
        _put(converted[name], tensor, (), part_of)


def weight_files(source: str | Path, trust: Trust = NO_TRUST) -> list[Path]:
    """The safetensors files of a directory or a Hub id. Raises ValueError where there are none."""
    directory = Path(source)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(
            snapshot_download(str(source), revision=trust.revision, allow_patterns=["*.safetensors", "*.json"])
        )
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source} has a config.json and no model.safetensors")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        stored = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    with stored:
        yield stored
