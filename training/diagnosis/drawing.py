"""How every picture of the project is set up, styled and saved: matplotlib without pyplot, drawn off screen.

matplotlib takes most of a second to import, so only what draws pays for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLOURS = BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
GREY = "#888888"


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9.0, 4.5), **how: Any) -> tuple[Any, Any]:
    """A figure and its panels as an array [row, column]; `how` goes to matplotlib's Figure.subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **how)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_bands(panels: Sequence[Any], bands: Iterable[tuple[str, float, float]]) -> None:
    """Stretches of the x axis (name, first, last) as bands through all panels, named above the first one."""
    for number, (name, first, last) in enumerate(bands):
        for axes in panels:
            axes.axvspan(first, last, color=GREY, alpha=0.12 if number % 2 else 0.0, linewidth=0, zorder=0)
        panels[0].annotate(
            name, (first, 1), xycoords=("data", "axes fraction"), xytext=(2, 4), textcoords="offset points",
            fontsize=8, color="#666666",
        )  # fmt: skip


def save_figure(figure: Any, path: Path, dots_per_inch: int = 150) -> None:
    """Write the format that the name says (none: PNG), whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a stage may have any name
            figure.savefig(temporary, dpi=dots_per_inch, format=path.suffix.removeprefix(".") or "png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
