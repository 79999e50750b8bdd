"""The token ledger: what became of every row and every token, for a file, for a run, and for a person to read."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.chat import Sample
from dataset.reader import Defect
from dataset.rows import PackedRows
from dataset.store import JoinedStore

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Ledger:
    """What became of every row of a file."""

    rejected: list[Defect] = field(default_factory=list)
    fatal: list[Defect] = field(default_factory=list)  # those of them that the options do not let pass
    lengths: list[int] = field(default_factory=list)
    spelled: Counter[str] = field(default_factory=Counter)
    read: int = 0
    kept: int = 0
    duplicates: int = 0
    seen: set[int] = field(default_factory=set)  # hashes of the samples so far
    supervised_tokens: int = 0
    truncated: int = 0
    cut_tokens: int = 0

    def count(self, sample: Sample, length: int) -> None:
        """Take in a sample that is kept, which had `length` tokens before it was cut."""
        self.truncated += len(sample.ids) < length
        self.cut_tokens += length - len(sample.ids)
        digest = hashlib.blake2b(sample.ids.tobytes(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        self.duplicates += number in self.seen
        self.seen.add(number)
        self.spelled.update(sample.spelled)
        self.lengths.append(len(sample.ids))
        self.supervised_tokens += int(sample.supervised[1:].sum())

    def report(self, layout: str) -> dict[str, Any]:
        rejected, tokens = len(self.rejected), sum(self.lengths)
        assert self.read == self.kept + rejected, (self.read, self.kept, rejected)
        return {
            "layout": layout,
            "rows_read": self.read,
            "rows_kept": self.kept,
            "rows_rejected": rejected,
            "rejected_by_code": dict(sorted(Counter(defect.code for defect in self.rejected).items())),
            "rejects": [
                {"line": defect.line, "code": defect.code, "message": defect.message} for defect in self.rejected
            ],
            "samples": len(self.lengths),
            "duplicates": self.duplicates,
            "samples_truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "tokens": tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / tokens,
            "length_quantiles": {
                name: int(np.quantile(self.lengths, share, method="nearest")) for name, share in QUANTILES.items()
            },
            "rows_spelling_control_tokens": dict(sorted(self.spelled.items())),
        }


def report_of(rows: PackedRows) -> dict[str, Any]:
    """The reports of the sources, the sums of their counts, and how their samples fill the rows of an epoch."""
    assert isinstance(rows.store, JoinedStore)
    reports = [{k: v for k, v in store.report.items() if k != "rejects"} for store in rows.store.stores]
    totals: Counter[str] = Counter()
    for report in reports:
        totals.update({key: value for key, value in report.items() if isinstance(value, int)})
    return {
        **totals,
        "supervised_share": totals["supervised_tokens"] / totals["tokens"],
        "sources": reports,
        "packing": {
            "samples": len(rows.samples),
            "tokens": int(rows.store.lengths[rows.samples].sum()),
            "rows": len(rows),
            "samples_per_row": len(rows.samples) / len(rows),
            "efficiency": rows.plan.efficiency,
            "padding_share": 1 - rows.plan.efficiency,
        },
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """A report of report_of as a table for a terminal."""
    for source in report["sources"]:
        quantiles = ", ".join(f"{name} {value}" for name, value in source["length_quantiles"].items())
        rejected = ", ".join(f"{count} {code}" for code, count in source["rejected_by_code"].items()) or "none"
        yield f"{source['path']} ({source['layout']}): {source['rows_read']:,} rows read, {source['rows_kept']:,} kept"
        yield f"  rejected: {rejected}; tokens of a sample: {quantiles}"
    counts = {name: value for name, value in report.items() if isinstance(value, (int, float))}
    for name, value in {**counts, **{f"packed {name}": value for name, value in report["packing"].items()}}.items():
        yield f"{name.replace('_', ' '):24} {value:>14{',.4f' if isinstance(value, float) else ','}}"
