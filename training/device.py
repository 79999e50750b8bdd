"""The device of a process: which it is, its memory, how it allocates, kernels that always add in one order."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # names of <malloc.h>


def choose_device(wanted: str, local_rank: int = 0, saves_memory: bool = False) -> torch.device:
    """The device of a process: `wanted` is auto, cpu or cuda. Raises ValueError where there is no such device.

    On a CPU freed memory is kept for the next tensor, or returned at once with `saves_memory`.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        set_up_malloc(saves_memory)
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--nproc_per_node: process {local_rank} has no GPU, there are {torch.cuda.device_count()} here"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_up_malloc(returns_freed: bool) -> None:
    """Let glibc keep freed memory for the next tensor, or return its pages to the system after each use.

    Faulting the same pages in again cost a fifth of a CPU step. But the whole layers that FSDP puts together and lets
    go of again leave gaps that nothing fits into, four times what they hold; left alone, glibc keeps those too. Other C
    libraries have no such switches.
    """
    if platform.libc_ver()[0] == "glibc":
        switches = {M_MMAP_THRESHOLD: 2**20} if returns_freed else {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
        for switch, value in switches.items():
            ctypes.CDLL(None).mallopt(switch, value)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device; what is no tensor stays on the host."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def device_name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_deterministic_kernels() -> None:
    """Only kernels that give the same bits every time; one without such a version raises an error naming itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
