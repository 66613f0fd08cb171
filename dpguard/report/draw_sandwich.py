"""Draws what every policy leaks between chance and bound: the sandwich, the same over noise, and the plain chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from dpguard.report.figure_content import Bars
from dpguard.report.marks import (
    NAME_LENGTH,
    Named,
    along,
    around,
    band_handles,
    legend,
    marker,
    name_points,
    pixels,
    settle,
)
from dpguard.report.sandwich_content import OverNoise, Panel, Slice
from dpguard.report.style import INK, LINE, MUTED, OPEN, PAPER, RED
from dpguard.report.text import short
from dpguard.stats import Interval

BOUND: dict[str, Any] = {"color": RED, "marker": "_", "markersize": 13, "markeredgewidth": 1.8, "zorder": 1.4}
"""A bound as a tick of its own."""
FLOOR: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (2, 2))}
"""What a guess scores, as a line."""


def height(rows: int, *, narrow: bool) -> float:
    """Inches that a chart with so many rows needs."""
    return (1.6 if narrow else 1.3) + (0.30 if narrow else 0.27) * max(rows, 1)


def draw_panel(ax: Axes, panel: Panel, *, narrow: bool) -> None:
    """One metric of the sandwich, one row a policy: the band from chance to bound, and on it what was measured."""
    for place, part in enumerate(panel.slices):
        _allowed(ax, place, part)
        _measured(ax, place, part)
    _rows(ax, [(part.number, part.policy) for part in panel.slices], panel.name, narrow=narrow)


def _allowed(ax: Axes, place: int, part: Slice) -> None:
    """The band that the guarantee allows, with its two ends; without a bound only where chance is."""
    start = part.chance or 0.0
    if part.bound is not None:
        box = Rectangle((start, place - 0.36), max(part.bound - start, 0.0), 0.72, facecolor=LINE, edgecolor="none")
        box.set(alpha=0.6, zorder=0.8)
        ax.add_patch(box)
        ends = [place - 0.38, place + 0.38]
        ax.plot([part.bound] * 2, ends, color=RED, linewidth=1.8, zorder=1.6, clip_on=False, gid=f"bound-{part.number}")
    if part.chance is not None:
        ends = [place - 0.38, place + 0.38]
        ax.plot(
            [part.chance] * 2, ends, color=MUTED, linewidth=1.2, zorder=1.5, clip_on=False, gid=f"chance-{part.number}"
        )
    if part.broken:
        ax.axhspan(place - 0.5, place + 0.5, color=RED, alpha=0.16, linewidth=0, zorder=0.5)


def _measured(ax: Axes, place: int, part: Slice) -> None:
    if part.measured is None:
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
        ax.text(0.5, place, "not measured", color=MUTED, va="center", ha="center", bbox=paper)
        return
    ends = [part.measured.low, part.measured.high]
    colour = part.band.colour if part.band else OPEN
    ax.plot(
        ends, [place, place], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round", clip_on=False, zorder=2,
        gid=f"measured-{part.number}",
    )  # fmt: skip
    marker(ax, part.measured.value, place, part.band)


def _rows(ax: Axes, rows: Sequence[tuple[int, str]], title: str, *, narrow: bool) -> None:
    names = [str(number) if narrow else short(policy, NAME_LENGTH) for number, policy in rows]
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xticks([0, 0.5, 1] if narrow else [0, 0.25, 0.5, 0.75, 1])
    ax.grid(axis="x", color=LINE, linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    ax.set_xlabel(title, color=INK)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def sandwich_legend(ax: Axes, panels: Sequence[Panel], *, narrow: bool) -> None:
    """What the marks, the band and its two ends mean."""
    parts = [part for panel in panels for part in panel.slices]
    handles: list[Artist] = band_handles((part.band for part in parts if part.measured), narrow=narrow)
    if any(part.chance is not None for part in parts):
        handles.append(_tick(MUTED, 1.4, "chance" if narrow else "chance: no message"))
    if any(part.bound is not None for part in parts):
        handles.append(_tick(RED, 2.0, "most allowed" if narrow else "the most that the guarantee allows"))
        handles.append(Patch(facecolor=LINE, alpha=0.6, label="allowed"))
    legend(ax, handles, 2 if narrow else -(-len(handles) // 2))


def _tick(colour: str, width: float, label: str) -> Line2D:
    return Line2D([], [], marker="|", linestyle="none", color=colour, markersize=11, markeredgewidth=width, label=label)


def draw_bars(ax: Axes, content: Bars, *, narrow: bool) -> None:
    """Leakage of every policy with its interval, over the floor."""
    for place, bar in enumerate(content.bars):
        _measured(ax, place, Slice(bar.number, bar.policy, bar.band, bar.leakage, None, None, broken=False))
    if content.floor:
        x, ends = content.floor.value, ax.get_xaxis_transform()
        ax.axvline(x, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        ax.text(x, 1.0, "floor", transform=ends, color=MUTED, va="bottom", ha="center")
    _rows(ax, [(bar.number, bar.policy) for bar in content.bars], content.metric, narrow=narrow)
    handles = band_handles(bar.band for bar in content.bars if bar.leakage)
    legend(ax, handles, 2 if narrow else len(handles))


def draw_over_noise(ax: Axes, content: OverNoise, *, narrow: bool) -> None:
    """Measured, bound and floor over the effective noise multiplier (a logarithmic axis)."""
    sigmas = [point.sigma for point in content.points]
    ax.set_xscale("log")
    ax.set_xlim(min(sigmas) / 1.35, max(sigmas) * 1.35)
    ax.set_ylim(-0.03, 1.05)
    if len(content.curves) > 1:  # each is about some of the policies only, and a line would not say which
        bounds = [(point.sigma, point.bound) for point in content.points if point.bound is not None]
        xs, ys = zip(*bounds, strict=True)
        ax.plot(xs, ys, linestyle="none", **BOUND, gid="bound")
    elif content.curves:
        xs, ys = zip(*content.curves[0], strict=True)
        ax.plot(xs, ys, color=RED, linewidth=1.6, zorder=1.4, gid="bound")
        ax.fill_between(xs, [content.chance or 0.0] * len(xs), ys, color=LINE, alpha=0.6, linewidth=0, zorder=0.4)
    if content.floor is not None:
        ax.axhline(content.floor, zorder=1, **FLOOR)
    for point in (p for p in content.points if p.labelled):
        colour = point.band.colour if point.band else OPEN
        _bar_at(ax, point.sigma, point.measured, RED if point.broken else colour, f"measured-{point.number}")
        marker(ax, point.sigma, point.measured.value, point.band, size=7.5)
    for step in dict.fromkeys(p.band for p in content.points):
        crowd = [p for p in content.points if p.band == step and not p.labelled]
        if crowd:
            marker(ax, [p.sigma for p in crowd], [p.measured.value for p in crowd], step, size=7.5)
    ax.xaxis.set_major_locator(_ticks(min(sigmas), max(sigmas)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("Effective noise multiplier of one step (more is safer)")
    ax.set_ylabel(content.metric)
    handles = band_handles(point.band for point in content.points)
    if content.curves:
        look: dict[str, Any] = {"linestyle": "none", **BOUND} if len(content.curves) > 1 else {"color": RED}
        handles.append(Line2D([], [], linewidth=1.6, label="the most that the guarantee allows", **look))
    if content.floor is not None:  # not on the line itself: markers and bars may be anywhere along it
        handles.append(Line2D([], [], label="floor: a guess, no message", **FLOOR))
    legend(ax, handles, 2 if narrow else len(handles))
    _name_noised(ax, content, narrow=narrow)


def _ticks(least: float, most: float) -> Locator:
    """Round values on a logarithmic axis, several of them however near its ends are."""
    if most < 3 * least:
        return MaxNLocator(5)
    return LogLocator(subs=(1.0,) if most > 30 * least else (1.0, 2.0, 5.0), numticks=12)


def _bar_at(ax: Axes, x: float, interval: Interval, colour: str, gid: str) -> None:
    ends = [interval.low, interval.high]
    ax.plot(
        [x, x], ends, color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round", clip_on=False, zorder=2, gid=gid
    )


def _name_noised(ax: Axes, content: OverNoise, *, narrow: bool) -> None:
    settle(ax)
    hard = [around(*pixels(ax, p.sigma, p.measured.value), 7) for p in content.points]
    runs = [((p.sigma, p.measured.low), (p.sigma, p.measured.high)) for p in content.points if p.labelled]
    runs += [(a, b) for line in content.curves for a, b in zip(line[:-1:4], line[4::4], strict=False)]
    if content.floor is not None:
        runs.append(((ax.get_xlim()[0], content.floor), (ax.get_xlim()[1], content.floor)))
    named = [
        Named(p.sigma, p.measured.value, str(p.number) if narrow else short(p.policy, NAME_LENGTH))
        for p in content.points
        if p.labelled
    ]
    name_points(ax, named, hard=hard, soft=along(ax, runs))
