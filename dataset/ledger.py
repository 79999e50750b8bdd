"""The token ledger: what became of every row and every token, for a file, for a run, and for a person to read."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.control_tokens import Sample
from dataset.errors import Defect
from dataset.rows import PackedRows

MOST_NOTES = 100  # of a file, each with its count; keys that differ from row to row would give millions
SPOKEN_NOTES = 20
OTHER_NOTES = "other notes, of more kinds than are counted apart"
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Ledger:
    """What became of every row of a file."""

    rejected: list[Defect] = field(default_factory=list)  # rows
    dropped: list[Defect] = field(default_factory=list)  # samples of rows whose other samples are kept
    fatal: list[Defect] = field(default_factory=list)  # those of both that the options do not let pass
    lengths: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    spelled: Counter[str] = field(default_factory=Counter)
    notes: dict[str, list[int]] = field(default_factory=dict)  # -> number of rows, first line
    read: int = 0
    kept: int = 0
    supervised_tokens: int = 0
    turn_by_turn: int = 0  # rows
    truncated: int = 0
    cut_tokens: int = 0

    def note(self, line: int, notes: Iterable[str]) -> None:
        """Take in what is to be said of a row that is kept."""
        counted = set()
        for note in notes:
            if note not in self.notes and len(self.notes) >= MOST_NOTES:
                note = OTHER_NOTES
            if note not in counted:
                counted.add(note)
                self.notes.setdefault(note, [0, line])[0] += 1

    def count(self, sample: Sample, length: int) -> None:
        """Take in a sample that is kept, which had `length` tokens before it was cut."""
        self.truncated += len(sample.ids) < length
        self.cut_tokens += length - len(sample.ids)
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
                {"line": defect.line, "code": defect.code, "message": defect.message}
                for defect in sorted([*self.rejected, *self.dropped], key=lambda defect: defect.line)
            ],
            "samples": len(self.lengths),
            "samples_dropped": len(self.dropped),
            "rows_turn_by_turn": self.turn_by_turn,
            "samples_truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "tokens": tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / tokens,
            "length_quantiles": {
                name: int(np.quantile(self.lengths, share, method="nearest")) for name, share in QUANTILES.items()
            },
            "rows_spelling_control_tokens": dict(sorted(self.spelled.items())),
            "notes": [
                {"note": note, "rows": -rows, "line": line}
                for rows, line, note in sorted((-rows, line, note) for note, (rows, line) in self.notes.items())
            ],
        }


def spoken(report: dict[str, Any]) -> Iterator[str]:
    """What a person should hear about a file at every start."""
    kept, share = f"{report['rows_kept']} of {report['rows_read']} rows kept", f"{100 * report['supervised_share']:.1f}"
    yield f"{kept}, {report['tokens']} tokens, {share} % supervised"
    if report["rows_turn_by_turn"]:
        yield (
            f"the chat template rewrites earlier turns of {report['rows_turn_by_turn']} rows, so each turn of theirs "
            f"is a sample: {report['samples']} in all"
        )
    for code, count in report["rejected_by_code"].items():
        yield f"{count} rows left out with {code}"
    if report["samples_dropped"]:
        yield f"{report['samples_dropped']} samples left out of rows whose other samples are kept"
    if report["samples_truncated"]:
        yield f"{report['samples_truncated']} samples cut, {report['cut_tokens']} tokens lost"
    if report["duplicates"]:
        yield f"{report['duplicates']} samples are the same as an earlier one (all of them are kept)"
    for token, count in report["rows_spelling_control_tokens"].items():
        way = f"--text_tokens {token!r} makes it the token, unless it marks turns"
        yield f"{count} rows spell {token} in their text, where it stays text; {way}"
    yield from note_lines(report)


def note_lines(report: dict[str, Any]) -> Iterator[str]:
    """What was read of a file otherwise than it was written, or not read: what most rows have comes first."""
    yield from report["file_notes"]
    for each in report["notes"][:SPOKEN_NOTES]:
        yield f"{each['note']}: {each['rows']} row{'s' * (each['rows'] > 1)}, the first is line {each['line']}"
    if len(report["notes"]) > SPOKEN_NOTES:
        yield f"{len(report['notes']) - SPOKEN_NOTES} more such notes are in data_report.json"


def report_of(rows: PackedRows) -> dict[str, Any]:
    """What became of the rows of all sources, and the samples that an epoch trains, counted as often as it does so."""
    store = rows.store
    sources = [{k: v for k, v in each.report.items() if k != "rejects"} for each in store.stores]
    of_the_files = ("rows_read", "rows_kept", "rows_rejected", "samples_dropped", "samples_truncated", "cut_tokens")
    tokens, supervised = int(store.lengths[rows.samples].sum()), int(store.targets[rows.samples].sum())
    return {
        **{name: sum(source[name] for source in sources) for name in of_the_files},
        "samples": len(rows.samples),
        "duplicates": len(rows.samples) - len(np.unique(store.digests[rows.samples])),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "rows": len(rows),
        "samples_per_row": len(rows.samples) / len(rows),
        "efficiency": rows.plan.efficiency,
        "padding_share": 1 - rows.plan.efficiency,
        "sources": sources,
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """A report of report_of as a table for a terminal."""
    for source in report["sources"]:
        quantiles = ", ".join(f"{name} {value}" for name, value in source["length_quantiles"].items())
        rejected = ", ".join(f"{count} {code}" for code, count in source["rejected_by_code"].items()) or "none"
        yield f"{source['path']} ({source['layout']}): {source['rows_read']:,} rows read, {source['rows_kept']:,} kept"
        yield f"  rejected: {rejected}; tokens of a sample: {quantiles}"
        yield from (f"  {line}" for line in note_lines(source))
    for name, value in report.items():
        if name != "sources":
            yield f"{name.replace('_', ' '):24} {value:>14{',.4f' if isinstance(value, float) else ','}}"
