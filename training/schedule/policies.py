"""What follows the course of a run: the multiplier of the learning rate, early stopping, the best result so far.

All of it is decided from numbers that every rank has alike, so every rank decides alike and nothing is exchanged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from training.config import Config
from training.schedule.adaptive import make_multiplier
from training.schedule.plan import Plan
from training.schedule.stopping import EarlyStopping, Memory
from training.schedule.sums import Sums, token_means
from training.schedule.train_state import LoopState

logger = logging.getLogger("train")


class Policies:
    def __init__(self, config: Config, state: LoopState, changed: bool = False):
        """Goes on with what `state` remembers; where flags of theirs were allowed to change, with what still fits."""
        self.state, self.metric, self.mode = state, config.monitor_metric, config.monitor_mode
        self.every = config.adaptive_every if config.lr_adapt != "none" else None
        self.multiplier = make_multiplier(replace(config, monitor_mode="min") if self.every else config)
        self.stopping = None
        if config.early_stopping_patience is not None:
            self.stopping = EarlyStopping(
                config.early_stopping_patience, config.early_stopping_min_delta, config.monitor_mode
            )  # fmt: skip
        self.uses_metric = bool(self.stopping) or bool(self.multiplier and not self.every) or config.save_top_k > 0
        self.parts: dict[str, Memory] = {}
        for name, part in (("multiplier", self.multiplier), ("stopping", self.stopping)):
            if part is not None:
                self.parts[name] = part
        if changed:
            self._forget_what_does_not_fit()
        for name in self.parts.keys() & state.policies.keys():
            self.parts[name].load_state_dict(state.policies[name])
        if self.every and "multiplier" not in state.policies:
            state.since_observed = Sums()  # nobody has looked yet, also where it was asked for only now
        state.lr_factor = self.multiplier.factor if self.multiplier else 1.0

    def _forget_what_does_not_fit(self) -> None:
        saved = self.state.policies
        saved.pop("stopped", None)
        if (saved.get("best") or {}).get("metric") != self.metric:
            for name in ("best", *self.parts):
                saved.pop(name, None)
        for name, part in self.parts.items():
            if name in saved and saved[name].keys() != part.state_dict().keys():
                logger.warning("what the %s remembers is of another kind, it begins anew", name)
                del saved[name]

    def check_metric(self, names: Sequence[str]) -> None:
        """ValueError where something waits for a metric that evaluations, which give these names, do not have."""
        if names and self.uses_metric and self.metric not in names:
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
        followed = self._training_loss(plan, sum_ints) if self.every else value
        if self.multiplier and followed is not None:
            if change := self.multiplier.observe(followed, plan.lr(state.step)):
                report(state.step, "learning_rate", **asdict(change))
            state.lr_factor = self.multiplier.factor
        for name, part in self.parts.items():
            state.policies[name] = part.state_dict()

    def _training_loss(self, plan: Plan, sum_ints: Callable[[Sequence[int]], list[int]]) -> float | None:
        """The mean since the last look, where --adaptive_every says that one is due."""
        if self.every is None or not plan.due(self.state, self.every):
            return None
        total, self.state.since_observed = self.state.since_observed.total(sum_ints), Sums()
        return token_means(total, "train")["train/loss"]

    def _remember(self, value: float) -> None:
        sign = 1 if self.mode == "min" else -1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"]):
            epoch = self.state.epoch + 1 if self.state.rows else self.state.epoch
            best = {"metric": self.metric, "value": value, "step": self.state.step, "epoch": epoch}
            self.state.policies["best"] = best
