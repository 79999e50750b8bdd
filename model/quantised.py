"""Weights of a few bits, which cannot be trained: found in config.json and in the headers of the files, and named."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from model.trust import NO_TRUST, Trust, read_json

BITS = ("bits", "num_bits", "nbits", "w_bit", "wbits", "weight_bits")
FIXED_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "nvfp4": 4, "bitnet": 2}
# How tensors of weights end; others (masks, counters) may hold whole numbers.
WEIGHTS = re.compile(r"(weight|weight_packed|qweight|_blocks)$")
TRAINABLE = ("F64", "F32", "F16", "BF16")


def refuse_quantised(source: str | Path, trust: Trust = NO_TRUST) -> None:
    """Raises ValueError for a directory or Hub id whose weights are quantised, before any of them is read."""
    said = quantisation_of(read_json(source, "config.json", trust)) or _packed_in(Path(source))
    if said:
        raise ValueError(f"{source}: weights {said} cannot be trained: take the unquantised model")


def quantisation_of(config: dict[str, Any]) -> str | None:
    """What a config.json says of quantised weights, None where it says nothing; also of the text part alone."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(name), dict) and found:
                return _described(found)
    return None


def _described(settings: dict[str, Any]) -> str:
    """`in 4 bits (gptq)`, or without the bits where nobody knows them."""
    method = str(settings.get("quant_method") or ("bitsandbytes" if _of_bitsandbytes(settings) else "unknown method"))
    method = "bitsandbytes" if method.startswith("bitsandbytes") else method
    bits = next(_bits_in(settings), None) or FIXED_BITS.get(method)
    return f"in {bits} bits ({method})" if bits else f"quantised with {method}"


def _of_bitsandbytes(settings: dict[str, Any]) -> bool:
    return any(name.startswith(("load_in_", "bnb_")) for name in settings)


def _bits_in(settings: Any) -> Iterator[int]:
    """Numbers of bits of weights, the plainest first."""
    if isinstance(settings, list):
        for each in settings:
            yield from _bits_in(each)
    if not isinstance(settings, dict):
        return
    yield from (settings[name] for name in BITS if isinstance(settings.get(name), int))
    yield from (bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True)
    inside = {name: value for name, value in settings.items() if not re.search("activation|cache|bnb_", name)}
    for value in inside.values():
        yield from _bits_in(value)
    for name in ("weights", "quant_type", "quant_algo", "_type", "format", "fmt"):
        if found := re.search(r"(?:int|float|fp|w)(\d+)|e\dm\d", str(inside.get(name, "")).lower()):
            yield int(found[1] or 8)


def _packed_in(directory: Path) -> str | None:
    """`of type F8_E4M3` where a file of the directory has weights of a type that is not trained."""
    for file in sorted(directory.glob("model*.safetensors")) if directory.is_dir() else []:
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if WEIGHTS.search(name)]  # noqa: SIM118 - not a dict
                found = {opened.get_slice(name).get_dtype() for name in names} - set(TRAINABLE)
        except (SafetensorError, OSError):
            continue  # whoever reads the weights says it better
        if found:
            return f"of type {', '.join(sorted(found))}"
    return None
