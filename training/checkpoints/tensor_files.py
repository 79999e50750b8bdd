"""Files of tensor blocks: safetensors that are hashed while they are written, and read back at any other sharding.

A file holds blocks of tensors under the tensors' names; its header says where each block begins, in the words of
torch.distributed.checkpoint's Hugging Face storage, whose reader opens these files too. Its writer is not used: it
neither forces files to the disk nor hashes them, and it has the ranks exchange pickles.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Offsets = tuple[int, ...]
# Values of a block on the CPU, where it begins in the whole tensor, and the shape of the whole.
Block = tuple[Tensor, Offsets, tuple[int, ...]]

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
KINDS = {name: dtype for dtype, name in DTYPES.items()}
WRITE_BYTES = 2**24


def bytes_of(blocks: Mapping[str, Block]) -> int:
    return sum(values.numel() * values.element_size() for values, _, _ in blocks.values())


def write_shard(path: Path, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """Write a new file and force it to the disk; returns its {name, size, sha256}, those of what lay in memory.

    Raises OSError. Blocks without elements are left out.
    """
    blocks = {name: block for name, block in sorted(blocks.items()) if block[0].numel()}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps({n: {"saved_offsets": at} for n, (_, at, _) in blocks.items()}),
            "shapes": json.dumps({name: shape for name, (_, _, shape) in blocks.items()}),
        }
    }
    end = 0
    for name, (values, _, _) in blocks.items():
        start, end = end, end + values.numel() * values.element_size()
        header[name] = {"dtype": DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes

    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        tensors = (_bytes(values) for values, _, _ in blocks.values())
        for part in itertools.chain([len(text).to_bytes(8, "little") + text], tensors):
            view = memoryview(part)
            for start in range(0, len(view), WRITE_BYTES):
                digest.update(view[start : start + WRITE_BYTES])
                file.write(view[start : start + WRITE_BYTES])
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _bytes(values: Tensor) -> Any:
    """The memory of a tensor as bytes, without a copy where it is contiguous."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


class ShardReader:
    """The tensors that lie in blocks in some files; any block of them is put together from those that it meets."""

    def __init__(self, files: Iterable[Path]):
        """Raises OSError naming a file that is no safetensors file or contradicts another."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}  # None: one that no run of ours has
        self._blocks: dict[str, list[tuple[Any, Offsets]]] = {}
        for path in files:
            try:
                file: Any = safe_open(path, framework="pt")
                metadata = file.metadata() or {}
                begins = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
                shapes = json.loads(metadata.get("shapes", "{}"))
                for name in file.keys():  # noqa: SIM118 - not a dict
                    own = file.get_slice(name).get_shape()
                    self.dtypes[name] = KINDS.get(file.get_slice(name).get_dtype())
                    shape = tuple(shapes.get(name, own))
                    if self.shapes.setdefault(name, shape) != shape:
                        raise ValueError(f"{name} is {shape} here and {self.shapes[name]} in another file")
                    offsets = begins[name]["saved_offsets"] if name in begins else [0] * len(own)
                    self._blocks.setdefault(name, []).append((file, tuple(offsets)))
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                # Written so: what was damaged later, the manifest has told.
                raise OSError(f"{path} is damaged: {error}") from None

    def read(self, name: str, target: Tensor, offsets: Offsets) -> None:
        """Fill `target` with the block of tensor `name` that begins at `offsets`.

        Raises ValueError where the files lack a part of it or hold one twice: the count alone would not tell.
        """
        filled = 0
        met: list[list[tuple[int, int]]] = []
        for file, begin in self._blocks.get(name, []):
            source = file.get_slice(name)
            sizes = source.get_shape()
            low = [max(a, b) for a, b in zip(offsets, begin, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, begin, sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            box = list(zip(low, high, strict=True))
            for other in met:
                if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
                    raise ValueError(f"{name}: two files hold the same values")
            met.append(box)
            here = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, begin, strict=True))
            there = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, offsets, strict=True))
            part = source[here] if here else file.get_tensor(name)
            target[there].copy_(part)
            filled += part.numel()
        if filled != target.numel():
            raise ValueError(f"{name}: the files hold {filled} of the {target.numel()} values that are needed here")

    def tensors(self) -> dict[str, Tensor]:
        """All of them, put together."""
        return {name: self.whole(name) for name in self.shapes}

    def whole(self, name: str) -> Tensor:
        """A tensor put together from all its blocks."""
        values = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read(name, values, (0,) * values.dim())
        return values
