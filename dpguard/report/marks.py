"""Pieces that the pictures share: points with intervals, names beside points, legends, figures of one size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from dpguard.report import labels
from dpguard.report.style import BANDS, INK, MUTED, OPEN, PAPER, Band

NAME_LENGTH = 30
BACKED = {"facecolor": PAPER, "alpha": 0.85, "pad": 0.6, "linewidth": 0}
"""Behind a name that lies on lines."""
OWN = "dpguard"
"""Label of the figures that are made here; a user's own are left as they are."""
WIDE, NARROW = 9.4, 4.5
"""Widths of a figure in inches: for a page, and for a column the width of a phone."""


def new_axes(narrow: bool, height: float, columns: int = 1, *, share: bool = False) -> list[Axes]:
    """Axes of a new figure, side by side."""
    figure = Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")
    figure.set_label(OWN)
    FigureCanvasAgg(figure)
    return list(figure.subplots(1, columns, sharey=share, squeeze=False)[0])


def marker(
    ax: Axes,
    x: float | list[float],
    y: float | list[float],
    band: Band | None,
    *,
    size: float = 6.5,
    gid: str | None = None,
    lower: float = 0.0,
) -> None:
    """Filled circles in their colour of the epsilon scale, or open diamonds without a formal guarantee.

    ``lower`` is by how much they are drawn under others.
    """
    ax.plot(
        x if isinstance(x, list) else [x],
        y if isinstance(y, list) else [y],
        marker="o" if band else "D",
        markersize=size if band else size - 1.2,
        markerfacecolor=band.colour if band else PAPER,
        markeredgecolor=INK if band else OPEN,
        markeredgewidth=0.7 if band else 1.5,
        linestyle="none",
        zorder=(3.1 if band else 3) - lower,  # where both lie on one place the promise shows, and can be pointed at
        clip_on=False,
        gid=gid,
    )


def band_handles(used: Iterable[Band | None], *, narrow: bool = False) -> list[Artist]:
    """Legend entries of the steps of the epsilon scale that occur, and of the open diamond."""
    found = set(used)
    handles: list[Artist] = [
        Line2D([], [], marker="o", linestyle="none", color=b.colour, markeredgecolor=INK, markeredgewidth=0.7,
               markersize=7.5, label=b.name)
        for b in BANDS
        if b in found
    ]  # fmt: skip
    if None in found:
        open_mark = Line2D([], [], marker="D", linestyle="none", markerfacecolor=PAPER, markersize=6)
        open_mark.set(
            markeredgecolor=OPEN,
            markeredgewidth=1.6,
            label="no guarantee (ε = ∞)" if narrow else "no formal guarantee (ε = ∞)",
        )
        handles.append(open_mark)
    return handles


def legend(ax: Axes, handles: Sequence[Artist], columns: int) -> None:
    """One legend below the figure; in a figure of the user's, below the axes."""
    if not handles:
        return
    look: dict[str, Any] = {"ncols": columns, "frameon": False, "handletextpad": 0.4, "columnspacing": 1.4}
    if isinstance(ax.figure, Figure) and ax.figure.get_label() == OWN:
        ax.figure.legend(handles=list(handles), loc="outside lower center", **look)
    else:
        look["ncols"] = min(columns, 3)
        ax.legend(handles=list(handles), loc="upper center", bbox_to_anchor=(0.5, -0.16), **look)


@dataclass(frozen=True)
class Named:
    """A point with a name, in data coordinates."""

    x: float
    y: float
    name: str
    bold: bool = False


def settle(ax: Axes) -> None:
    """Give the axes their final place, so that pixels can be counted."""
    figure = ax.get_figure(root=True)
    if not isinstance(figure, Figure):
        return
    engine = figure.get_layout_engine()
    if figure.get_label() == OWN and engine is not None:
        engine.execute(figure)  # the layout alone, at half the time of a drawing that nobody sees
        figure.set_layout_engine("none")
    else:
        figure.draw_without_rendering()


def name_points(ax: Axes, points: Sequence[Named], *, hard: Sequence[labels.Box], soft: Sequence[labels.Box]) -> None:
    """Write each name beside its point, off the boxes (pixels) that others take; the axes are settled."""
    written = [
        ax.text(0, 0, p.name, fontweight="bold" if p.bold else "normal", ha="left", va="bottom", zorder=4)
        for p in points
    ]
    sizes = [(1.05 * box.width, box.height) for box in (text.get_window_extent() for text in written)]
    places = [pixels(ax, p.x, p.y) for p in points]
    spots = labels.place(
        places,
        sizes,
        bounds=edges(ax.get_window_extent()),
        hard=hard,
        soft=soft,
    )
    back = ax.transData.inverted()
    for number, (text, spot, point, size) in enumerate(zip(written, spots, points, sizes, strict=True)):
        x, y = back.transform((spot.x, spot.y))
        text.set_position((float(x), float(y)))
        box = np.array([spot.x, spot.y, spot.x + size[0], spot.y + size[1]])
        if labels.covered((box[0], box[1], box[2], box[3]), soft):  # a line under it ends beside its words
            text.set_bbox(BACKED)
        if spot.distance > labels.RINGS[1] or labels.strays([box], number, places)[0]:
            _leader(ax, point, spot, size)


def _leader(ax: Axes, point: Named, spot: labels.Place, size: tuple[float, float]) -> None:
    """A thin line from the point to the nearest place of its label's box."""
    x, y = pixels(ax, point.x, point.y)
    near = (min(max(x, spot.x), spot.x + size[0]), min(max(y, spot.y), spot.y + size[1]))
    (x0, y0), (x1, y1) = ax.transData.inverted().transform([(x, y), near])
    ax.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.6, alpha=0.7, zorder=2.5)


def pixels(ax: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point of the data is on the canvas."""
    px, py = ax.transData.transform((x, y))
    return float(px), float(py)


def around(x: float, y: float, room: float) -> labels.Box:
    """A box around a pixel."""
    return (x - room, y - room, x + room, y + room)


def edges(box: Bbox) -> labels.Box:
    """Left, bottom, right and top of a box."""
    return (float(box.x0), float(box.y0), float(box.x1), float(box.y1))


def along(ax: Axes, runs: Iterable[tuple[tuple[float, float], tuple[float, float]]]) -> list[labels.Box]:
    """Boxes (pixels) around straight lines between points of the data."""
    boxes = []
    for start, end in runs:
        (x0, y0), (x1, y1) = pixels(ax, *start), pixels(ax, *end)
        boxes.append((min(x0, x1) - 1.5, min(y0, y1) - 1.5, max(x0, x1) + 1.5, max(y0, y1) + 1.5))
    return boxes
