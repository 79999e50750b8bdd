"""The result of a run: best/ and final/ from their checkpoints."""

from collections.abc import Callable
from pathlib import Path

import torch

from training.checkpoints.checkpointer import weights_to_export
from training.checkpoints.store import CheckpointStore
from training.config import Config


def export_results(config: Config, store: CheckpointStore, last_step: int, export: Callable[..., None]) -> None:
    """Write best/ and final/ from their checkpoints; `export(directory, state_dict, dtype)`."""
    best = store.best(store.manifests())[:1] if config.keep_best else []
    for name, step in (*(("best", step) for step in best), ("final", last_step)):  # the last one says: done
        weights = weights_to_export(store.path(step), averaged=config.export_ema)
        export(Path(config.save_dir) / name, state_dict=weights, dtype=getattr(torch, config.export_dtype))
