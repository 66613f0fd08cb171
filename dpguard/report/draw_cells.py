"""Cells of a heat map: a value on its shade, or words on a hatched one where there is no value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.patches import Rectangle

from dpguard.report.style import INK, MUTED, OPEN, PAPER
from dpguard.report.text import number

DARK, LIGHT = "#0b0f14", "#ffffff"
"""Of the figures on a cell: its own colour decides which, by day and by night."""


@dataclass(frozen=True)
class Written:
    """What is in a cell: words alone, or a value with a note below it."""

    words: str
    value: float | None = None
    note: str = ""


def draw_cell(ax: Axes, x: int, y: int, written: Written, ends: tuple[float, float], shades: Colormap) -> None:
    """One cell of a grid of unit squares; ``ends`` are the values at the two ends of the shades."""
    if written.value is None:
        hatched = Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=PAPER, edgecolor=OPEN, linewidth=0)
        hatched.set(hatch="////", alpha=0.45)
        ax.add_patch(hatched)
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        ax.text(x + 0.5, y + 0.5, written.words, color=MUTED, ha="center", va="center", fontsize=7.5, bbox=paper)
        return
    low, high = ends
    colour = shades((written.value - low) / (high - low) if high > low else 0.5)
    ax.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=colour, edgecolor="none"))
    ink = DARK if _luminance(colour) > 0.25 else LIGHT
    middle = 0.4 if written.note else 0.5
    ax.text(x + 0.5, y + middle, number(written.value), color=ink, ha="center", va="center", fontweight="bold",
            fontsize=9)  # fmt: skip
    if written.note:
        ax.text(x + 0.5, y + 0.72, written.note, color=ink, ha="center", va="center", fontsize=7.5)


def grid(ax: Axes, columns: Sequence[str], rows: Sequence[str], *, narrow: bool) -> None:
    """Axes of unit squares with their names, the first row on top."""
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    ax.set_xticks([x + 0.5 for x in range(len(columns))], list(columns), color=INK)
    ax.set_yticks([y + 0.5 for y in range(len(rows))], list(rows), color=INK)
    if narrow:
        ax.tick_params(axis="x", rotation=90)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _luminance(colour: Sequence[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
