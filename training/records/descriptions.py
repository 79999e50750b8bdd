"""The files that describe a run for whoever reads it a year later: which flags, data, code, versions and hardware."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.config import Config
from training.disk import replace_json

logger = logging.getLogger("train")

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "numpy", "wandb")


def write_descriptions(
    save_dir: Path, config: Config, report: dict[str, Any], device_name: str, world_size: int, threads: int
) -> None:
    """config.yaml, data_report.json and environment.json: the flags, the data, the code and the machine of a run.

    A full disk is told and is no reason to end: checkpoints have their own rules.
    """
    try:
        (save_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        replace_json(save_dir / "data_report.json", report)
        replace_json(save_dir / "environment.json", describe_environment(device_name, world_size, threads))
    except OSError as error:
        logger.warning("what describes the run cannot be written: %s", error)


def describe_environment(device_name: str, world_size: int, threads: int) -> dict[str, Any]:
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device_name,
        "world_size": world_size,
        "threads_per_process": threads,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with `+changes` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
