"""Draws the map: what each part of the model leaks when just that is shared, and what it is worth, as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.patches import Rectangle

from dpguard.report.map_content import Map, MapCell
from dpguard.report.style import INK, MUTED, OPEN, PAPER
from dpguard.report.text import at_name, metric_name, number, percent

DARK, LIGHT = "#0b0f14", "#ffffff"
"""Of the figures on a cell: its own colour decides which, by day and by night."""


def draw_map(ax: Axes, content: Map, *, of: str, narrow: bool, at: str = "") -> None:
    """One heat map onto axes.

    Args:
        ax: where.
        content: the map.
        of: ``leakage`` or ``utility``.
        narrow: for a column the width of a phone.
        at: of leakage, the position in the training; empty: the largest over all.
    """
    shades = seaborn.color_palette("viridis" if of == "utility" else "rocket_r", as_cmap=True)
    columns = list(content.columns)
    for row, column in content.places:
        x, y = columns.index(column) if column in columns else 0, content.rows.index(row)
        cell = content.cells.get((row, column))
        _cell(ax, x, y, _written(cell, of, at, narrow), _range(content, of), shades)
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(content.rows), 0)
    ax.set_xticks([x + 0.5 for x in range(len(columns))], [_short(c, narrow) for c in columns], color=INK)
    ax.set_yticks([y + 0.5 for y in range(len(content.rows))], list(content.rows), color=INK)
    if narrow:
        ax.tick_params(axis="x", rotation=90)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    leaks = f"{metric_name(content.leakage_metric)} when just that is shared"
    worth = f"{metric_name(content.utility_metric)} when just that is trained"
    leaks += f", {at_name(at)}" if at else ""
    ax.set_title(leaks if of == "leakage" else worth, color=INK, loc="left")


@dataclass(frozen=True)
class _Written:
    """What is in a cell: words alone, or a value with the part's share below it."""

    words: str
    value: float | None = None
    share: str = ""


def _written(cell: MapCell | None, of: str, at: str, narrow: bool) -> _Written:
    if cell is None:
        return _Written("–" if narrow else "no record")
    if of == "leakage" and cell.guessed:
        return _Written("×" if narrow else "no attack\ncould run")
    value = cell.leakage if of == "leakage" else cell.utility
    mean = cell.leakage_at.get(at) if at else value.value if value else None
    return _Written("–" if narrow else "not measured", mean, percent(cell.share))


def _short(column: str, narrow: bool) -> str:
    short = column.removeprefix("attention.") if column != "attention.output" else column
    return short.replace(".", " " if narrow else "\n")


def _range(content: Map, of: str) -> tuple[float, float]:
    """Leakage has the whole scale; utility the one that occurs, whose ends the cells print."""
    if of == "leakage":
        return (0.0, 1.0)
    values = [cell.utility.value for cell in content.cells.values() if cell.utility]
    return (min(values, default=0.0), max(values, default=1.0))


def _cell(ax: Axes, x: int, y: int, written: _Written, ends: tuple[float, float], shades: Colormap) -> None:
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
    ax.text(x + 0.5, y + 0.4, number(written.value), color=ink, ha="center", va="center", fontweight="bold",
            fontsize=9)  # fmt: skip
    ax.text(x + 0.5, y + 0.72, written.share, color=ink, ha="center", va="center", fontsize=7.5)


def _luminance(colour: Sequence[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
