"""What a run has said so far, kept as columns of numbers, and thinned out for a chart.

Every value of every series is kept up to MAX_ROWS records, then every second pair of neighbours goes; a chart gets the
smallest and the largest value of each of its buckets, so that a spike of one step is seen at any zoom.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.dashboard.runs import clean

MAX_POINTS = 1500  # of a series in a chart
MAX_ROWS = 1 << 20  # records of a kind that are kept
MAX_SERIES = 200
MAX_EVENTS, MAX_EPOCHS, MAX_SAMPLES, MAX_ALERTS = 1000, 2000, 60, 500
ABSENT = math.inf  # a record without this series; one that says that its value is not finite has NaN


class Table:
    """The records of one kind: their steps, times, and a column for each number that any of them has."""

    def __init__(self) -> None:
        self.step, self.time = array("d"), array("d")
        self.columns: dict[str, array[float]] = {}

    def extend(self, records: list[dict[str, Any]]) -> None:
        before = len(self.step)
        names = {name for record in records for name in record if "/" in name or name.endswith("_seconds")}
        for name in sorted(names - self.columns.keys())[: MAX_SERIES - len(self.columns)]:
            self.columns[name] = array("d", [ABSENT]) * before
        self.step.extend([_float(record["step"]) for record in records])
        self.time.extend([_float(record.get("time")) for record in records])
        for name, column in self.columns.items():
            values = [record.get(name, ABSENT) for record in records]
            column.extend([v if type(v) is float else _float(v) for v in values])
        if len(self.step) > MAX_ROWS:
            self._halve()

    def _halve(self) -> None:
        keep = np.arange(len(self.step)) // 2 % 2 == 0
        self.step, self.time = array("d", np.array(self.step)[keep]), array("d", np.array(self.time)[keep])
        self.columns = {name: array("d", np.array(column)[keep]) for name, column in self.columns.items()}

    def series(self, max_points: int) -> dict[str, dict[str, list[Any]]]:
        """Name -> {step, time, value}, at most `max_points` of each; null where a value was not finite."""
        step, time = np.array(self.step), np.array(self.time)
        result: dict[str, dict[str, list[Any]]] = {}
        for name, column in self.columns.items():
            values = np.array(column)
            there = np.flatnonzero(values != ABSENT)
            if not len(there) or name in ("time", "step"):
                continue
            kept = there[thin(values[there], max_points)]
            result[name] = {
                "step": [int(s) for s in step[kept]],
                "time": [round(t, 3) if math.isfinite(t) else None for t in time[kept].tolist()],
                "value": [float(f"{v:.7g}") if math.isfinite(v) else None for v in values[kept].tolist()],
            }
        return result


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def thin(values: NDArray[np.float64], max_points: int) -> NDArray[np.intp]:
    """Places of at most `max_points` values: the first and last, the extremes of each bucket, one gap if it has one."""
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    bad = ~np.isfinite(values)
    buckets = max(1, (max_points - 2) // (3 if bad.any() else 2))
    edges = np.linspace(0, count, buckets + 1).astype(np.intp)[:-1]
    bucket = np.zeros(count, dtype=np.intp)
    bucket[edges[1:]] = 1
    bucket = np.cumsum(bucket)
    kept = [0, count - 1]
    for order in (np.where(bad, np.inf, values), np.where(bad, np.inf, -values)):
        best = np.minimum.reduceat(order, edges)
        hits = np.flatnonzero((order == best[bucket]) & ~bad)
        _, first = np.unique(bucket[hits], return_index=True)
        kept += hits[first].tolist()
    gaps = np.flatnonzero(bad)
    _, first = np.unique(bucket[gaps], return_index=True)
    return np.unique(np.array([*kept, *gaps[first].tolist()], dtype=np.intp))


class History:
    """All that a page needs of a run at its first look, however long it has been."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.events: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []

    def add(self, records: list[dict[str, Any]]) -> None:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            kinds.setdefault(record["kind"], []).append(record)
        for kind, found in kinds.items():
            if kind == "event":
                shown = [r for r in found if r.get("event") == "sample"]
                self.samples = (self.samples + clean(shown))[-MAX_SAMPLES:]
                self.events = (self.events + clean([r for r in found if r.get("event") != "sample"]))[-MAX_EVENTS:]
            elif kind == "epoch":
                self.epochs = (self.epochs + clean(found))[-MAX_EPOCHS:]
            elif kind in self.tables or len(self.tables) < 8:
                self.tables.setdefault(kind, Table()).extend(found)

    def add_alerts(self, alerts: list[dict[str, Any]]) -> None:
        self.alerts = (self.alerts + clean(alerts))[-MAX_ALERTS:]

    def snapshot(self, max_points: int = MAX_POINTS) -> dict[str, Any]:
        series: dict[str, Any] = {}
        for table in self.tables.values():
            series |= table.series(max_points)
        lists = {"events": self.events, "samples": self.samples, "epochs": self.epochs, "alerts": self.alerts}
        return {"series": series, **lists}
