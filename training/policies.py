"""What follows the course of a run: the multiplier of the learning rate, early stopping, the best result so far.

All of it is decided from numbers that every rank has alike, so every rank decides alike and nothing is exchanged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from training.adaptive import make_multiplier
from training.config import Config
from training.plan import Plan
from training.state import LoopState
from training.stopping import EarlyStopping
from training.sums import Sums, token_means

logger = logging.getLogger("train")


class Policies:
    def __init__(self, config: Config, state: LoopState, changed: bool = False):
        """Goes on with what `state` remembers; where flags of theirs were allowed to change, with what still fits."""
        self.state, self.metric, self.mode, self.every = state, config.monitor_metric, config.monitor_mode, None
        if config.lr_adapt != "none":
            self.every = config.adaptive_every
        self.multiplier = make_multiplier(replace(config, monitor_mode="min") if self.every else config)
        self.stopping = None
        if config.early_stopping_patience is not None:
            self.stopping = EarlyStopping(
                config.early_stopping_patience, config.early_stopping_min_delta, config.monitor_mode
            )  # fmt: skip
        self.uses_metric = bool(self.stopping) or bool(self.multiplier and not self.every) or config.save_top_k > 0
        if changed:
            state.policies.pop("stopped", None)
            if (state.policies.get("best") or {}).get("metric") != self.metric:
                for name in ("best", "multiplier", "stopping"):
                    state.policies.pop(name, None)
        for name, policy in (("multiplier", self.multiplier), ("stopping", self.stopping)):
            if policy is not None and name in state.policies:
                try:
                    policy.load_state_dict(state.policies[name])
                except ValueError:
                    if not changed:
                        raise
                    logger.warning("what the %s remembers is of another kind, it begins anew", name)
        if self.every and "multiplier" not in state.policies:
            state.since_observed = Sums()  # nobody has looked yet, also where it was asked for only now
        state.lr_factor = self.multiplier.factor if self.multiplier else 1.0

    def check_metric(self, names: Iterable[str]) -> None:
        """ValueError where something waits for a metric that evaluations, which give these names, do not have."""
        if self.uses_metric and self.metric not in names:
            raise ValueError(f"--monitor_metric {self.metric}: an evaluation gives {', '.join(names)}")

    @property
    def stopped(self) -> bool:
        """Whether the run is to end early."""
        return self.stopping is not None and bool(self.state.policies.get("stopped"))

    @property
    def best(self) -> dict[str, Any] | None:
        """{metric, value, step, epoch} of the best evaluation so far."""
        return self.state.policies.get("best")

    def observe(
        self,
        results: dict[str, float],
        plan: Plan,
        sum_ints: Callable[[Sequence[int]], list[int]],
        report: Callable[..., None],
    ) -> None:
        """Take in what an evaluation gave (nothing, where there was none); `report(step, event, **values)`."""
        state, value = self.state, results.get(self.metric)
        if value is not None:
            self._remember(value)
            if self.stopping and self.stopping.observe(value):
                state.policies["stopped"] = True
                report(state.step, "early_stopping", waited=self.stopping.waited, best=self.stopping.best)
        if self.every:
            value = None
            if plan.due(state, self.every):
                value = token_means(state.since_observed.total(sum_ints), "train")["train/loss"]
                state.since_observed = Sums()
        if self.multiplier and value is not None:
            change = self.multiplier.observe(value, plan.lr(state.step))
            if change:
                report(
                    state.step, "learning_rate", before=change.before, after=change.after, reason=change.reason
                )  # fmt: skip
            state.lr_factor = self.multiplier.factor
        for name, policy in (("multiplier", self.multiplier), ("stopping", self.stopping)):
            if policy is not None:
                state.policies[name] = policy.state_dict()

    def _remember(self, value: float) -> None:
        sign = 1 if self.mode == "min" else -1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"]):
            epoch = self.state.epoch + 1 if self.state.rows else self.state.epoch
            best = {"metric": self.metric, "value": value, "step": self.state.step, "epoch": epoch}
            self.state.policies["best"] = best
