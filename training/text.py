"""Texts for people: numbers, durations, and what others wrote, made safe for a terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

SAMPLE_CHARACTERS = 2000  # of a text that somebody else wrote


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "from nothing"


def plain(text: Any) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def one_line(text: Any) -> str:
    return " ".join(plain(text).split())


def cell(text: Any) -> str:
    """Any text as one line of Markdown that shows it and means nothing else."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", one_line(text)).replace("&", "&amp;")


def as_text(text: str) -> Iterator[str]:
    """Any text as a block that nothing in it can end."""
    shown = plain(text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …")
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", shown))]))
    yield from (f"{fence}text", *shown.split("\n"), fence)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of any text as a table of Markdown."""
    yield f"| {' | '.join(map(cell, head))} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"


def duration(seconds: float) -> str:
    """A span of time as a person writes it: 45s, 3m20s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
