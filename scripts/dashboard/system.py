"""How busy the machine is: processor, memory, disk, and NVIDIA GPUs where there are any."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def read_system(runs_dir: Path) -> dict[str, Any]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(runs_dir)
    return {
        "cpu_percent": psutil.cpu_percent(interval=None),  # since it was last asked
        "cores": os.cpu_count(),
        "memory_used_bytes": memory.total - memory.available,
        "memory_total_bytes": memory.total,
        "disk_used_bytes": disk.used,
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "gpus": read_gpus(),
    }


def read_gpus() -> list[dict[str, Any]]:
    """What the NVIDIA driver says of each GPU, [] without one; what it does not know is None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all of them mean that there is nothing to show
        return []
    gpus = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu: dict[str, Any] = dict.fromkeys(("name", "percent", "memory_used_bytes", "memory_total_bytes"))
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = pynvml.nvmlDeviceGetName(handle)
                gpu["name"] = name.decode() if isinstance(name, bytes) else name
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                gpu |= {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}
                gpu["percent"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
                gpu["celsius"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                gpu["watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
            gpus.append(gpu)
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()
    return gpus
