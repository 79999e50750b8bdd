"""What the machine of rank 0 is doing: memory, processors, disk, GPUs. A thread looks, that of the loop writes.

It draws no random number and touches no tensor, so that no bit of a run depends on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
SECONDS = 10.0  # between two records
GPU_SECONDS = 1.0  # between two looks at the GPUs, whose utilisation changes faster than that
FIRST_SECONDS = 1.0  # a processor's share is one since the last look


class Gpus:
    """The GPUs that the processes on this host use, by NVML; none where it is not there, which is asked once."""

    def __init__(self, count: int):
        self.handles: list[Any] = []
        if count:
            with contextlib.suppress(Exception):  # no driver, no package, no permission: there is nothing to be told
                import pynvml

                pynvml.nvmlInit()
                self.nvml = pynvml
                for name in visible_gpus(count):
                    self.handles.append(self._handle(name))

    def _handle(self, name: str) -> Any:
        if name.isdecimal():
            return self.nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self.nvml.nvmlDeviceGetHandleByUUID(name)

    def memory(self) -> list[tuple[str, int, int]]:
        """Name, bytes in all and bytes free of each."""
        found = []
        for handle in self.handles:
            with contextlib.suppress(Exception):
                known, name = self.nvml.nvmlDeviceGetMemoryInfo(handle), self.nvml.nvmlDeviceGetName(handle)
                found.append((str(name), int(known.total), int(known.free)))
        return found

    def utilization(self) -> dict[int, float]:
        """Per cent of the last moments in which each GPU computed something."""
        found = {}
        for i, handle in enumerate(self.handles):
            with contextlib.suppress(Exception):  # a slice of a GPU (MIG) has none
                found[i] = float(self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return found

    def figures(self) -> dict[str, float]:
        """What else they say; whatever a GPU does not know is left out."""
        found: dict[str, float] = {}
        for i, handle in enumerate(self.handles):
            nvml, name = self.nvml, f"system/gpu{i}"
            with contextlib.suppress(Exception):
                found[f"{name}/memory_used_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB
            with contextlib.suppress(Exception):
                found[f"{name}/temperature"] = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            with contextlib.suppress(Exception):
                found[f"{name}/power_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return found


def visible_gpus(count: int) -> list[str]:
    """The first `count` names (numbers or UUIDs) in CUDA_VISIBLE_DEVICES, or numbers where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else (name.strip() for name in visible.split(","))
    return [name for name in names if name][:count]


def job_ram_bytes() -> int:
    """Resident memory of the processes of this job on this host; what they share counts in each of them."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    total, own = 0, psutil.Process(os.getppid() if launched else os.getpid())
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it may have ended since
            total += process.memory_info().rss
    return total


class SystemWatch:
    """A thread that keeps the newest figures; `take` gives them to the thread that writes records."""

    def __init__(self, directory: Path, gpus: int, seconds: float = SECONDS):
        """`directory`: on the disk whose room is of interest; `gpus`: how many the job uses on this host."""
        self.directory, self.seconds, self.gpus = directory, seconds, Gpus(gpus)
        self._newest: dict[str, float] = {}
        self._since_record: dict[int, list[float]] = {}
        self._since_epoch: list[float] = []
        self._closed = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="system figures", daemon=True).start()

    def take(self) -> dict[str, float]:
        """The figures that nobody has taken yet, if there are any."""
        newest, self._newest = self._newest, {}
        return newest

    def take_gpu_utilization(self) -> float | None:
        """Mean over the GPUs and the time since the last call, in per cent; None where there is nothing to tell."""
        seen, self._since_epoch = self._since_epoch, []
        return sum(seen) / len(seen) if seen else None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        psutil.cpu_percent()  # since the last call of this thread, so that the first answer is worth nothing
        due = time.monotonic() + min(FIRST_SECONDS, self.seconds)
        pause = GPU_SECONDS if self.gpus.handles else self.seconds
        while not self._closed.wait(max(0.0, min(pause, due - time.monotonic()))):
            for i, share in self.gpus.utilization().items():
                self._since_record.setdefault(i, []).append(share)
                self._since_epoch.append(share)
            if time.monotonic() >= due:
                due = time.monotonic() + self.seconds
                with contextlib.suppress(OSError, psutil.Error):
                    self._newest = self.look()

    def look(self) -> dict[str, float]:
        """The figures of this moment, those of processors and GPUs since the last call."""
        shares, self._since_record = self._since_record, {}
        return {
            "system/ram_used_gib": job_ram_bytes() / GIB,
            "system/ram_percent": psutil.virtual_memory().percent,
            "system/cpu_percent": psutil.cpu_percent(),
            "system/disk_free_gib": shutil.disk_usage(self.directory).free / GIB,
            **{f"system/gpu{i}/utilization": sum(seen) / len(seen) for i, seen in shares.items()},
            **self.gpus.figures(),
        }
