"""Rotary positions, and how their frequencies are stretched for contexts longer than those of the first training."""

import math
from typing import Any

import torch
from torch import Tensor

# rope_type -> the numbers it cannot do without. What depends on the length of the whole input (dynamic, longrope) is
# missing on purpose: a packed document would get other angles than alone.
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
MORE_NUMBERS = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def scaling_in(rope: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers' `rope_parameters` or `rope_scaling` say besides theta, under one name for the type.

    None where nothing is stretched. Raises ValueError for what is not computed here.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    said = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    said = {name: value for name, value in said.items() if value is not None}
    if said.pop("partial_rotary_factor", 1.0) != 1.0 or any(isinstance(value, dict) for value in said.values()):
        raise ValueError("rotary positions of a part of each head, or not alike in all layers, are not computed here")
    if kind == "default":
        return None  # whatever else stands there is not read
    if problems := scaling_problems({"rope_type": kind, **said}):
        raise ValueError("; ".join(problems))
    return {"rope_type": kind, **said}


def scaling_problems(scaling: dict[str, Any]) -> list[str]:
    """Why positions cannot be stretched like this; empty where they can."""
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        return [f"rope_type {kind} is none of {', '.join(SCALINGS)}"]
    numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
    known = (*SCALINGS[kind], *MORE_NUMBERS.get(kind, ()))
    problems = [f"rope_type {kind} needs {name}" for name in SCALINGS[kind] if name not in numbers]
    problems += [f"rope_type {kind} does not know {name}" for name in numbers if name not in known]
    for name, value in numbers.items():
        if not (isinstance(value, bool) if name == "truncate" else type(value) in (int, float) and value > 0):
            problems.append(f"rope {name} {value} is not possible")
    if kind == "llama3" and not problems and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        problems.append("rope high_freq_factor must be greater than low_freq_factor")
    return problems


def rotary_angles(
    position_ids: Tensor, head_dim: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, head_dim / 2) of the rotary angles (Su et al. 2021), times a factor that yarn has.

    In float32 for every model, float64 ones included, because transformers does so and weights were trained with it.
    """
    frequencies, size = rotary_frequencies(head_dim, theta, scaling, position_ids.device)
    angles = position_ids.float()[:, None, None] * frequencies
    return angles.cos() * size, angles.sin() * size


def rotary_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """The angle (head_dim / 2,) of each pair from one position to the next, and the factor of cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies, 1.0
    numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
    if scaling["rope_type"] == "yarn":
        return _yarn(frequencies, head_dim, theta, **numbers)
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, **numbers), 1.0
    return frequencies / numbers["factor"], 1.0


def _llama3(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:  # fmt: skip
    """Slow turns are slowed down by `factor`, fast ones kept, those between mixed (Llama 3.1, Dubey et al. 2024)."""
    turns = original_max_position_embeddings / (2 * math.pi / frequencies)  # in the context of the first training
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(
    frequencies: Tensor, head_dim: int, theta: float, factor: float, original_max_position_embeddings: int,
    attention_factor: float | None = None, beta_fast: float = 32.0, beta_slow: float = 1.0,
    mscale: float | None = None, mscale_all_dim: float | None = None, truncate: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """YaRN (Peng et al. 2023): a ramp over the pairs from kept to slowed down, and larger angles' cosines and sines."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0.0, 1.0)

    def growth(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if attention_factor is None:
        attention_factor = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth()
    return frequencies / factor * (1 - kept) + frequencies * kept, attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x (T, heads, head_dim), the half-split order of Hugging Face weights.

    The result is at least as wide as the angles; attention narrows it where its kernel wants that.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
