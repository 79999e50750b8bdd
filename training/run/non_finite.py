"""What becomes of a step whose gradient is not finite."""

import logging
import math

from torch import Tensor

from dataset.rows import FILLER, PackedRows
from model.language_model import Batch
from training.records.run_log import RunRecords
from training.run.learner import Learner
from training.schedule.train_state import LoopState

logger = logging.getLogger("train")


def judge_norm(
    learner: Learner, norm: float, losses: list[Tensor], window: list[Batch], state: LoopState, records: RunRecords,
    rows: PackedRows,
) -> None:  # fmt: skip
    """Count and report a step whose gradient was not finite; raises NonFiniteError when there are too many."""
    if math.isfinite(norm):
        state.non_finite_in_a_row = 0
        return
    guilty = [batch for batch, loss in zip(window, losses, strict=True) if not loss.isfinite()]
    found = learner.processes.any(bool(guilty))
    if learner.scaler.is_enabled() and not found and learner.scaler.get_scale() >= 1.0:
        state.overflows += 1  # routine in fp16: the losses are fine, the scale was too high and has just been halved
        return
    # Where all losses are finite, the backward pass has overflowed, and nobody can tell for which rank's samples.
    ids = [i for batch in (guilty if found else window) for i in batch["sample_ids"] if i != FILLER]
    samples, rank = [rows.store.where(i) for i in ids], learner.processes.rank
    if samples:
        message = "step %d: gradient norm %s, weights left alone; samples of rank %d: %s"
        logger.warning(message, state.step, norm, rank, ", ".join(samples))
    records.event(state.step, "non_finite_gradient", samples=samples)
    state.count_non_finite()
