"""Draws the map: what each part of the model leaks when just that is shared, and what it is worth, as heat maps."""

from __future__ import annotations

from collections.abc import Sequence

import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.patches import Rectangle

from dpguard.report.map_content import Map, MapCell
from dpguard.report.style import INK, MUTED, OPEN, PAPER
from dpguard.report.text import metric_name, number, percent
from dpguard.stats import Interval

DARK, LIGHT = "#0b0f14", "#ffffff"
"""Of the figures on a cell: its own colour decides which, by day and by night."""


def draw_map(ax: Axes, content: Map, *, of: str, narrow: bool) -> None:
    """One heat map onto axes.

    Args:
        ax: where.
        content: the map.
        of: ``leakage`` or ``utility``.
        narrow: for a column the width of a phone.
    """
    shades = seaborn.color_palette("viridis" if of == "utility" else "rocket_r", as_cmap=True)
    columns = list(content.columns)
    for row, column in content.places:
        x, y = columns.index(column) if column in columns else 0, content.rows.index(row)
        cell = content.cells.get((row, column))
        value = None if cell is None else cell.leakage if of == "leakage" else cell.utility
        _cell(ax, x, y, cell, value, _range(content, of), shades, narrow)
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
    ax.set_title(leaks if of == "leakage" else worth, color=INK, loc="left")


def _short(column: str, narrow: bool) -> str:
    short = column.removeprefix("attention.") if column != "attention.output" else column
    return short.replace(".", " " if narrow else "\n")


def _range(content: Map, of: str) -> tuple[float, float]:
    """Leakage has the whole scale; utility the one that occurs, whose ends the cells print."""
    if of == "leakage":
        return (0.0, 1.0)
    values = [cell.utility.value for cell in content.cells.values() if cell.utility]
    return (min(values, default=0.0), max(values, default=1.0))


def _cell(
    ax: Axes,
    x: int,
    y: int,
    cell: MapCell | None,
    value: Interval | None,
    ends: tuple[float, float],
    shades: Colormap,
    narrow: bool,
) -> None:
    if value is None:
        hatched = Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=PAPER, edgecolor=OPEN, linewidth=0)
        hatched.set(hatch="////", alpha=0.45)
        ax.add_patch(hatched)
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        words = "–" if narrow else "no record" if cell is None else "not measured"
        ax.text(x + 0.5, y + 0.5, words, color=MUTED, ha="center", va="center", fontsize=7.5, bbox=paper)
        return
    low, high = ends
    colour = shades((value.value - low) / (high - low) if high > low else 0.5)
    ax.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=colour, edgecolor="none"))
    ink = DARK if _luminance(colour) > 0.25 else LIGHT
    ax.text(x + 0.5, y + 0.4, number(value.value), color=ink, ha="center", va="center", fontweight="bold",
            fontsize=9)  # fmt: skip
    share = percent(cell.share) if cell else ""
    ax.text(x + 0.5, y + 0.72, share, color=ink, ha="center", va="center", fontsize=7.5)


def _luminance(colour: Sequence[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
