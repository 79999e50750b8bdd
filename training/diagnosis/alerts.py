"""alerts.jsonl: what the diagnosis found in the records of a run, and whether the run is to stop for it.

The book follows metrics.jsonl as a sink does. What it reads are numbers that are logged anyway, so nothing that is
trained depends on it, unless `--on_alert stop` says so; and then only on alerts of level error, none of whose rules
looks at a clock.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.diagnosis.rules import ERROR, Alert, History, kind_of
from training.records.metrics import MetricsLog, Record, read_records

logger = logging.getLogger("train")

# Records of its kind for which a rule must have been silent before it speaks again.
QUIET = {"train": 50, "eval": 3, "system": 100, "non_finite_gradient": 0}


class AlertBook:
    def __init__(self, path: Path, grad_clip: float = 0.0, stops: bool = False):
        """`stops`: whether an alert of level error ends the run."""
        self.log_file, self.grad_clip, self.stops = MetricsLog(path), grad_clip, stops
        self.history = History(grad_clip)
        self.stopping_for: Alert | None = None
        self._say: Callable[[str], None] = logger.warning
        self._seen: Counter[str] = Counter()  # records by kind
        self._fired: dict[str, int] = {}  # when a rule found something last, in records of its kind

    def start(
        self, records: Sequence[Record], step: int, whole_step: bool, total_steps: int, say: Callable[[str], None]
    ) -> None:
        """Cut the alerts back as the metrics were, and find out from their records which rules have just spoken."""
        self.log_file.start(step, whole_step)
        self.history, self._say = History(self.grad_clip, total_steps), say
        left = Counter(map(kind_of, records))
        for record in records:
            kind = kind_of(record)
            left[kind] -= 1
            self._take(record, looks=left[kind] <= QUIET.get(kind, -1))

    def log(self, record: dict[str, Any]) -> None:
        for alert in self._take(record):
            numbers = {name: n if math.isfinite(n) else None for name, n in alert.numbers.items()}
            said = {"level": alert.level, "rule": alert.rule, "numbers": numbers, "advice": alert.advice}
            self.log_file.write(str(record["kind"]), alert.step, **said)
            self._say(str(alert))
            if self.stops and alert.level == ERROR and self.stopping_for is None:
                self.stopping_for = alert

    def wants_stop(self) -> bool:
        return self.stopping_for is not None

    def close(self) -> None:
        self.log_file.close()

    def _take(self, record: dict[str, Any], looks: bool = True) -> list[Alert]:
        """The alerts that a record gives rise to, of rules that have been silent for a while."""
        kind = self.history.add(record)
        self._seen[kind] += 1
        now, new = self._seen[kind], []
        for alert in self.history.look(kind) if looks else ():
            if alert is not None:
                last = self._fired.get(alert.rule)
                if last is None or now - last > QUIET[kind]:
                    new.append(alert)
                self._fired[alert.rule] = now
        return new


def read_alerts(run_dir: Path) -> list[dict[str, Any]]:
    """The alerts of a run, oldest first; none where nothing was found."""
    path = run_dir / "alerts.jsonl"
    return [record for record in read_records(path) if "rule" in record] if path.exists() else []
