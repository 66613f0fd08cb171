"""What the pictures of a report contain, as data, apart from how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpguard.report.frontier import CONTROL, Frontier, Row
from dpguard.report.style import Band, band
from dpguard.report.text import metric_name
from dpguard.stats import Interval

LABELLED = 24
"""With more points than this, only the front (no more of it than this) and the control are named and have bars."""
LISTED = 60
"""With more policies than this, the leakage chart lists only the front and the control."""
NEAR = (0.004, 0.01)
"""Of the picture's width and height: points nearer than this cover each other."""


@dataclass(frozen=True)
class Point:
    """One policy in the trade-off picture.

    ``number`` is its row in the table, counted from 1; only ``labelled`` points have a name and interval bars.
    ``under`` counts the points at its place that are drawn on top of it, so that it must be larger to be seen.
    """

    number: int
    policy: str
    leakage: Interval
    utility: Interval
    band: Band | None
    on_front: bool
    labelled: bool
    under: int = 0


@dataclass(frozen=True)
class Tradeoff:
    """What the trade-off picture contains.

    Attributes:
        points: the policies measured in full.
        front: corners of the Pareto front, from the least leaking to the most useful.
        floor: leakage of the prior attack.
        ceiling: leakage of the undefended control.
        undefended: utility of the undefended control.
        majority: accuracy of always answering the commonest class.
        by_client: that is each client's own.
        absent: policies that could not be drawn, with the reason.
        x_label: what leakage is.
        y_label: what utility is.
    """

    points: tuple[Point, ...]
    front: tuple[tuple[float, float], ...]
    floor: float | None
    ceiling: float | None
    undefended: float | None
    majority: float | None
    by_client: bool
    absent: tuple[tuple[str, str], ...]
    x_label: str
    y_label: str

    @property
    def heights(self) -> tuple[float, float]:
        """Least and greatest utility in the picture."""
        levels = [level for level in (self.majority, self.undefended) if level is not None]
        return _heights(self.points, levels)

    @property
    def stacked(self) -> bool:
        """Whether some point lies under another one."""
        return any(point.under for point in self.points)


def tradeoff_content(frontier: Frontier) -> Tradeoff:
    """Compute the trade-off picture."""
    whole = [(number, row) for number, row in enumerate(frontier.rows, 1) if row.leakage and row.utility is not None]
    named = _named([row for _, row in whole])
    points = tuple(
        Point(
            number,
            row.policy,
            row.leakage,
            row.utility,
            band(row.epsilon),
            row.on_front,
            row.policy in named,
        )
        for number, row in whole
        if row.leakage and row.utility
    )
    absent = [(row.policy, why_absent(row)) for row in frontier.rows if not (row.leakage and row.utility)]
    control = frontier.ceiling
    return Tradeoff(
        _stacked(points),
        tuple(sorted({(p.leakage.value, p.utility.value) for p in points if p.on_front})),
        frontier.floor.value if frontier.floor else None,
        control.leakage.value if control and control.leakage else None,
        control.utility.value if control and control.utility else None,
        frontier.majority if frontier.utility_metric == "accuracy" else None,
        frontier.by_client,
        tuple(absent),
        f"Leakage: {metric_name(frontier.leakage_metric)} of the strongest attack (less is better)",
        f"Utility: {metric_name(frontier.utility_metric)} on held-out texts",
    )


def _heights(points: Sequence[Point], levels: Sequence[float] = ()) -> tuple[float, float]:
    ends = [*(end for point in points for end in (point.utility.low, point.utility.high)), *levels]
    return min(ends, default=0.0), max(ends, default=1.0)


def _stacked(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, those under others counted: on top are those with a guarantee, the strongest first.

    In a crowd there is no room for rings around rings, and none are counted.
    """
    if len(points) > LABELLED:
        return tuple(points)
    low, high = _heights(points)
    wide, tall = NEAR[0], NEAR[1] * max(high - low, 0.02)
    found: dict[int, Point] = {}
    for point in sorted(points, key=lambda p: (p.band.most if p.band else math.inf, p.band is None, p.number)):
        above = [
            other.under
            for other in found.values()
            if abs(other.leakage.value - point.leakage.value) <= wide
            and abs(other.utility.value - point.utility.value) <= tall
        ]
        found[point.number] = replace(point, under=1 + max(above)) if above else point
    return tuple(found[point.number] for point in points)


def _named(rows: Sequence[Row]) -> set[str]:
    """Policies whose points get a name: all, or in a crowd the control and the front, one for each place."""
    if len(rows) <= LABELLED:
        return {row.policy for row in rows}
    places: dict[tuple[float, float], str] = {}
    for row in sorted(rows, key=lambda row: row.policy != CONTROL):
        if (row.on_front or row.policy == CONTROL) and row.leakage and row.utility:
            places.setdefault((round(row.leakage.value, 2), round(row.utility.value, 2)), row.policy)
    return set(list(places.values())[:LABELLED])


def why_absent(row: Row) -> str:
    """Why a policy has no point: its gaps, or the leg that the study does not have."""
    told = dict.fromkeys(f"{gap.leg} {gap.status}: {gap.reason}" for gap in row.gaps)
    if told:
        return "; ".join(told)
    return "leakage was not measured" if row.leakage is None else "utility was not measured"


@dataclass(frozen=True)
class Bar:
    """One policy in the leakage chart."""

    number: int
    policy: str
    leakage: Interval | None
    band: Band | None


@dataclass(frozen=True)
class Bars:
    """What the leakage chart contains; ``left_out`` counts the policies that there was no room for."""

    bars: tuple[Bar, ...]
    floor: Interval | None
    left_out: int
    metric: str


def leakage_content(frontier: Frontier) -> Bars:
    """Compute the leakage chart: every policy, in the study's order."""
    rows = list(enumerate(frontier.rows, 1))
    if len(rows) > LISTED:
        rows = [(number, row) for number, row in rows if row.on_front or row.policy == CONTROL][:LISTED]
    bars = tuple(Bar(number, row.policy, row.leakage, band(row.epsilon)) for number, row in rows)
    return Bars(bars, frontier.floor, len(frontier.rows) - len(bars), metric_name(frontier.leakage_metric))
