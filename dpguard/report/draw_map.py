"""Draws the map: what each part of the model leaks when just that is shared, and what it is worth, as heat maps."""

from __future__ import annotations

import seaborn
from matplotlib.axes import Axes

from dpguard.report.draw_cells import Written, draw_cell, grid
from dpguard.report.map_content import Map, MapCell
from dpguard.report.style import INK
from dpguard.report.text import at_name, metric_name, percent


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
        draw_cell(ax, x, y, _written(cell, of, at, narrow), _range(content, of), shades)
    grid(ax, [_short(c, narrow) for c in columns], content.rows, narrow=narrow)
    leaks = f"{metric_name(content.leakage_metric)} when just that is shared"
    worth = f"{metric_name(content.utility_metric)} when just that is trained"
    leaks += f", {at_name(at)}" if at else ""
    ax.set_title(leaks if of == "leakage" else worth, color=INK, loc="left")


def _written(cell: MapCell | None, of: str, at: str, narrow: bool) -> Written:
    if cell is None:
        return Written("–" if narrow else "no record")
    if of == "leakage" and cell.guessed:
        return Written("×" if narrow else "no attack\ncould run")
    value = cell.leakage if of == "leakage" else cell.utility
    mean = cell.leakage_at.get(at) if at else value.value if value else None
    return Written("–" if narrow else "not measured", mean, percent(cell.share))


def _short(column: str, narrow: bool) -> str:
    short = column.removeprefix("attention.") if column != "attention.output" else column
    return short.replace(".", " " if narrow else "\n")


def _range(content: Map, of: str) -> tuple[float, float]:
    """Leakage has the whole scale; utility the one that occurs, whose ends the cells print."""
    if of == "leakage":
        return (0.0, 1.0)
    values = [cell.utility.value for cell in content.cells.values() if cell.utility]
    return (min(values, default=0.0), max(values, default=1.0))
