"""Draws leakage against utility from its content."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dpguard.report import labels
from dpguard.report.figure_content import Point, Tradeoff
from dpguard.report.marks import (
    NAME_LENGTH,
    Named,
    along,
    around,
    band_handles,
    edges,
    legend,
    marker,
    name_points,
    pixels,
    settle,
)
from dpguard.report.style import INK, LINE, MUTED, OPEN
from dpguard.report.text import short

NEAR = 0.45
"""Of floor and ceiling: nearer than this, their names stand one above the other."""
UNDER, RINGS = 4.4, 4
"""By how much a point grows for each that covers it, so that a ring of it shows, and up to how many times."""
RING: dict[str, Any] = {
    "marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.3,
    "linestyle": "none", "zorder": 3.3, "clip_on": False,
}  # fmt: skip
"""Around the recommended policy."""


def draw_tradeoff(ax: Axes, content: Tradeoff, *, narrow: bool, chosen: str = "") -> None:
    """Draw onto axes; points have the ids ``point-1``, ``point-2``, ... as in the table. ``chosen`` gets a ring."""
    _limits(ax, content)
    _lines(ax, content, narrow)
    for point in content.points:
        _point(ax, point)
        if point.policy == chosen:
            ring = {**RING, "markersize": RING["markersize"] + _grown(point)}
            ax.plot([point.leakage.value], [point.utility.value], **ring)
    handles = band_handles(point.band for point in content.points)
    if len(content.front) > 1:
        handles.append(Line2D([], [], color=INK, alpha=0.55, linewidth=1.1, label="Pareto front"))
    if any(point.policy == chosen for point in content.points):
        handles.append(Line2D([], [], label="recommended", **RING))
    legend(ax, handles, 2 if narrow else len(handles))
    ax.set_xlabel("Leakage (less is better)" if narrow else content.x_label)
    ax.set_ylabel(content.y_label)
    _names(ax, content, narrow)


def _limits(ax: Axes, content: Tradeoff) -> None:
    low, high = content.heights
    room = max(0.08 * (high - low), 0.02)
    ax.set_xlim(-0.02, 1.03)
    ax.set_ylim(low - room, high + room)


def _lines(ax: Axes, content: Tradeoff, narrow: bool) -> None:
    """Floor and ceiling, each named above its line, the two levels of utility, and the front."""
    ends = ax.get_xaxis_transform()
    floor, ceiling = ("floor", "ceiling") if narrow else ("floor: a guess, no message", "ceiling: no defence")
    near = content.floor is not None and content.ceiling is not None and abs(content.ceiling - content.floor) < NEAR
    for x, name, raised in ((content.floor, floor, False), (content.ceiling, ceiling, near)):
        if x is not None:
            ax.axvline(x, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            height = 1.065 if raised else 1.015
            ax.text(x, height, name, transform=ends, color=MUTED, ha="right" if x > 0.6 else "left", va="bottom")
    for y in (content.undefended, content.majority):
        if y is not None:
            ax.axhline(y, color=LINE, linewidth=1.0, zorder=0.5)
    if len(content.front) > 1:
        xs, ys = zip(*content.front, strict=True)
        ax.plot(xs, ys, color=INK, linewidth=1.1, alpha=0.55, drawstyle="steps-post", zorder=1.5, gid="front")


def _point(ax: Axes, point: Point) -> None:
    x, y = point.leakage, point.utility
    bars: dict[str, Any] = {"linewidth": 1.6, "alpha": 0.5, "solid_capstyle": "round", "zorder": 2, "clip_on": False}
    bars["color"] = point.band.colour if point.band else OPEN
    if point.labelled:
        ax.plot([x.low, x.high], [y.value, y.value], gid=f"bar-{point.number}", **bars)
        ax.plot([x.value, x.value], [y.low, y.high], gid=f"bar-{point.number}-u", **bars)
    size, lower = 8.4 + _grown(point), 0.01 * point.under
    marker(ax, x.value, y.value, point.band, size=size, gid=f"point-{point.number}", lower=lower)


def _grown(point: Point) -> float:
    """By how much a point is larger than one that nothing covers."""
    return UNDER * min(point.under, RINGS)


def _names(ax: Axes, content: Tradeoff, narrow: bool) -> None:
    """Name the levels and the points."""
    settle(ax)
    markers = [around(*pixels(ax, p.leakage.value, p.utility.value), 7) for p in content.points]
    lines = _drawn(ax, content)
    commonest = "own commonest class" if content.by_client else "commonest class"
    if not narrow:
        commonest = "each client answers its commonest class" if content.by_client else "always the commonest class"
    levels = ((content.undefended, "no defence"), (content.majority, commonest))
    taken = [_name_level(ax, y, name, markers + lines) for y, name in levels if y is not None]
    named = [
        Named(
            p.leakage.value,
            p.utility.value,
            str(p.number) if narrow else short(p.policy, NAME_LENGTH),
            p.on_front,
        )
        for p in content.points
        if p.labelled
    ]
    name_points(ax, named, hard=markers + taken, soft=lines)


def _name_level(ax: Axes, y: float, name: str, obstacles: Sequence[labels.Box]) -> labels.Box:
    """Name a level of utility on its line, at the freest place along it; returns the box taken."""
    sides = ax.get_yaxis_transform()
    text = ax.text(0.985, y, name, transform=sides, color=MUTED, ha="right")
    best: tuple[float, float, str] | None = None
    for x in (0.985, 0.8, 0.65, 0.5, 0.35, 0.2):
        for side in ("bottom", "top"):
            text.set(x=x, va=side)
            box = edges(text.get_window_extent())
            outside = max(float(ax.get_window_extent().x0) - box[0], 0)
            cost = labels.covered(box, obstacles) + 100 * outside
            if best is None or cost < best[0]:
                best = (cost, x, side)
    _, x, side = best or (0.0, 0.985, "bottom")
    text.set(x=x, va=side)
    return edges(text.get_window_extent())


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
    return along(ax, runs)
