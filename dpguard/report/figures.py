"""Draws the pictures of a report from their content (`figure_content`), with seaborn's style."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from dpguard.report import labels
from dpguard.report.figure_content import Bar, Point, Tradeoff, leakage_content, tradeoff_content
from dpguard.report.frontier import Frontier
from dpguard.report.style import BANDS, INK, LINE, MUTED, OPEN, PAPER, RED, styled
from dpguard.report.text import visible
from dpguard.stats import Interval

NAME_LENGTH = 30


def tradeoff(frontier: Frontier, *, ax: Axes | None = None, narrow: bool = False) -> Axes:
    """Draw leakage (x) against utility (y): intervals, front, ceiling and floor; colour is epsilon.

    A filled circle has a formal guarantee, an open diamond has none.

    Args:
        frontier: of the study.
        ax: where to draw; a new figure by default.
        narrow: for a column the width of a phone: points carry their row's number instead of a name.

    Returns:
        The axes; points have the ids ``point-1``, ``point-2``, ... as in the table.
    """
    content = tradeoff_content(frontier)
    with styled(narrow):
        if ax is None:
            figure = Figure(figsize=(4.5, 5.0) if narrow else (9.4, 5.6), layout="constrained")
            FigureCanvasAgg(figure)
            ax = figure.subplots()
        _limits(ax, content)
        _lines(ax, content, narrow)
        for point in content.points:
            _point(ax, point)
        _legend(ax, content, narrow)
        ax.set_xlabel("Leakage (less is better)" if narrow else content.x_label)
        ax.set_ylabel(content.y_label)
        _names(ax, content, narrow)
    return ax


def _limits(ax: Axes, content: Tradeoff) -> None:
    ends = [end for p in content.points for end in (p.utility.low, p.utility.high)]
    ends += [level for level in (content.majority, content.undefended) if level is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = max(0.08 * (high - low), 0.02)
    ax.set_xlim(-0.02, 1.03)
    ax.set_ylim(low - room, high + room)


def _lines(ax: Axes, content: Tradeoff, narrow: bool) -> None:
    """Floor and ceiling, each named above its line, the two levels of utility, and the front."""
    ends = ax.get_xaxis_transform()
    floor, ceiling = ("floor", "ceiling") if narrow else ("floor: a guess, no message", "ceiling: no defence")
    for x, name in ((content.floor, floor), (content.ceiling, ceiling)):
        if x is not None:
            ax.axvline(x, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            ax.text(x, 1.015, name, transform=ends, color=MUTED, ha="right" if x > 0.6 else "left", va="bottom")
    for y in (content.undefended, content.majority):
        if y is not None:
            ax.axhline(y, color=LINE, linewidth=1.0, zorder=0.5)
    if len(content.front) > 1:
        xs, ys = zip(*content.front, strict=True)
        ax.plot(xs, ys, color=INK, linewidth=1.1, alpha=0.55, drawstyle="steps-post", zorder=1.5, gid="front")


def _point(ax: Axes, point: Point) -> None:
    colour = point.band.colour if point.band else OPEN
    x, y = point.leakage, point.utility
    bars: dict[str, Any] = {"color": colour, "linewidth": 1.6, "alpha": 0.5, "solid_capstyle": "round", "zorder": 2}
    if point.labelled:
        ax.plot([x.low, x.high], [y.value, y.value], gid=f"bar-{point.number}", **bars)
        ax.plot([x.value, x.value], [y.low, y.high], gid=f"bar-{point.number}-u", **bars)
    ax.plot(
        [x.value],
        [y.value],
        marker="o" if point.band else "D",
        markersize=8.5 if point.band else 7.0,
        markerfacecolor=colour if point.band else PAPER,
        markeredgecolor=INK if point.band else colour,
        markeredgewidth=0.7 if point.band else 1.7,
        linestyle="none",
        zorder=3,
        clip_on=False,
        gid=f"point-{point.number}",
    )


def _legend(ax: Axes, content: Tradeoff, narrow: bool) -> None:
    used = {point.band for point in content.points}
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="none",
            color=b.colour,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            markersize=7.5,
            label=b.name,
        )
        for b in BANDS
        if b in used
    ]
    if None in used:
        open_mark = Line2D([], [], marker="D", linestyle="none", markerfacecolor=PAPER, markersize=6)
        open_mark.set(markeredgecolor=OPEN, markeredgewidth=1.6, label="no formal guarantee (ε = ∞)")
        handles.append(open_mark)
    if len(content.front) > 1:
        handles.append(Line2D([], [], color=INK, alpha=0.55, linewidth=1.1, label="Pareto front"))
    if handles and isinstance(ax.figure, Figure):
        ax.figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2 if narrow else len(handles),
            frameon=False,
            handletextpad=0.4,
            columnspacing=1.4,
        )


def _names(ax: Axes, content: Tradeoff, narrow: bool) -> None:
    """Name the levels and the points, once the axes have their final place."""
    figure = ax.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    markers = [_around(*_pixels(ax, p.leakage.value, p.utility.value), 7) for p in content.points]
    lines = _drawn(ax, content)
    commonest = "commonest class" if narrow else "always the commonest class"
    levels = ((content.undefended, "no defence"), (content.majority, commonest))
    taken = [_name_level(ax, y, name, markers + lines) for y, name in levels if y is not None]
    shown = [point for point in content.points if point.labelled]
    written = []
    for point in shown:
        name = str(point.number) if narrow else visible(point.policy, limit=NAME_LENGTH)
        weight = "bold" if point.on_front else "normal"
        written.append(ax.text(0, 0, name, fontweight=weight, ha="left", va="bottom", zorder=4))
    sizes = [(1.05 * box.width, box.height) for box in (text.get_window_extent() for text in written)]
    spots = labels.place(
        [_pixels(ax, p.leakage.value, p.utility.value) for p in shown],
        sizes,
        bounds=_edges(ax.get_window_extent()),
        hard=markers + taken,
        soft=lines,
    )
    back = ax.transData.inverted()
    for text, spot, point, size in zip(written, spots, shown, sizes, strict=True):
        x, y = back.transform((spot.x, spot.y))
        text.set_position((float(x), float(y)))
        if spot.distance > labels.RINGS[1]:
            _leader(ax, point, spot, size)


def _name_level(ax: Axes, y: float, name: str, obstacles: Sequence[labels.Box]) -> labels.Box:
    """Name a level of utility on its line, at the freest place along it; returns the box taken."""
    sides = ax.get_yaxis_transform()
    best: tuple[float, float, str] | None = None
    for x in (0.985, 0.8, 0.65, 0.5, 0.35, 0.2):
        for side in ("bottom", "top"):
            text = ax.text(x, y, name, transform=sides, color=MUTED, ha="right", va=side)
            box = _edges(text.get_window_extent())
            text.remove()
            outside = max(float(ax.get_window_extent().x0) - box[0], 0)
            cost = labels.covered(box, obstacles) + 100 * outside
            if best is None or cost < best[0]:
                best = (cost, x, side)
    _, x, side = best or (0.0, 0.985, "bottom")
    return _edges(ax.text(x, y, name, transform=sides, color=MUTED, ha="right", va=side).get_window_extent())


def _leader(ax: Axes, point: Point, spot: labels.Place, size: tuple[float, float]) -> None:
    """A thin line from the point to the nearest place of its label's box."""
    x, y = _pixels(ax, point.leakage.value, point.utility.value)
    near = (min(max(x, spot.x), spot.x + size[0]), min(max(y, spot.y), spot.y + size[1]))
    (x0, y0), (x1, y1) = ax.transData.inverted().transform([(x, y), near])
    ax.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.6, alpha=0.7, zorder=2.5)


def _pixels(ax: Axes, x: float, y: float) -> tuple[float, float]:
    px, py = ax.transData.transform((x, y))
    return float(px), float(py)


def _around(x: float, y: float, room: float) -> labels.Box:
    return (x - room, y - room, x + room, y + room)


def _edges(box: Bbox) -> labels.Box:
    return (float(box.x0), float(box.y0), float(box.x1), float(box.y1))


def _drawn(ax: Axes, content: Tradeoff) -> list[labels.Box]:
    """Boxes around every line in the picture: interval bars, floor, ceiling, levels and the front's steps."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    runs = [((x, y0), (x, y1)) for x in (content.floor, content.ceiling) if x is not None]
    runs += [((x0, y), (x1, y)) for y in (content.undefended, content.majority) if y is not None]
    for p in (point for point in content.points if point.labelled):
        runs.append(((p.leakage.low, p.utility.value), (p.leakage.high, p.utility.value)))
        runs.append(((p.leakage.value, p.utility.low), (p.leakage.value, p.utility.high)))
    for (ax0, ay0), (ax1, ay1) in pairwise(content.front):
        runs += [((ax0, ay0), (ax1, ay0)), ((ax1, ay0), (ax1, ay1))]
    boxes = []
    for start, end in runs:
        (left, low), (right, high) = _pixels(ax, *start), _pixels(ax, *end)
        boxes.append((left - 1.5, low - 1.5, right + 1.5, high + 1.5))
    return boxes


def leakage(frontier: Frontier, *, narrow: bool = False) -> tuple[Axes, Axes]:
    """Draw what every policy leaks over the floor, and how often a text came back whole against the bound.

    Args:
        frontier: of the study.
        narrow: for a column the width of a phone: rows carry numbers, the panels stand closer.

    Returns:
        The axes of the leakage metric and those of exact match.
    """
    content = leakage_content(frontier)
    with styled(narrow):
        high = 0.9 + (0.30 if narrow else 0.27) * max(len(content.bars), 1)
        figure = Figure(figsize=(4.5, high) if narrow else (9.4, high), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for place, bar in enumerate(content.bars):
            _bar(left, place, bar, bar.leakage)
            _bar(right, place, bar, bar.exact)
            if bar.bound is not None and bar.exact is not None:
                ends = [place - 0.33, place + 0.33]
                right.plot([bar.bound] * 2, ends, color=RED, linewidth=1.8, gid=f"bound-{bar.number}")
        if content.floor:
            x, ends_of_axis = content.floor.value, left.get_xaxis_transform()
            left.axvline(x, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            left.text(x, 1.0, "floor", transform=ends_of_axis, color=MUTED, va="bottom", ha="center")
        names = [str(b.number) if narrow else visible(b.policy, limit=NAME_LENGTH) for b in content.bars]
        left.set_yticks(range(len(names)), names, color=INK)
        left.set_ylim(len(names) - 0.4, -0.6)
        for ax, title in ((left, content.metric), (right, "exact match")):
            ax.set_xlim(-0.03, 1.03)
            ax.set_xticks([0, 0.5, 1] if narrow else [0, 0.25, 0.5, 0.75, 1])
            ax.grid(axis="x", color=LINE, linewidth=0.6, zorder=0)
            ax.set_xlabel(title, color=INK)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
    return left, right


def _bar(ax: Axes, place: int, bar: Bar, interval: Interval | None) -> None:
    if interval is None:
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
        ax.text(0.5, place, "not measured", color=MUTED, va="center", ha="center", bbox=paper)
        return
    colour = bar.band.colour if bar.band else OPEN
    ends = [interval.low, interval.high]
    ax.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="round", zorder=2)
    ax.plot(
        [interval.value],
        [place],
        marker="o" if bar.band else "D",
        markersize=6.5 if bar.band else 5.5,
        markerfacecolor=colour if bar.band else PAPER,
        markeredgecolor=INK if bar.band else colour,
        markeredgewidth=0.7 if bar.band else 1.5,
        linestyle="none",
        zorder=3,
        clip_on=False,
    )


def figure_of(ax: Axes) -> Figure:
    """The figure that axes made here belong to."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes were removed from their figure")
    return figure
