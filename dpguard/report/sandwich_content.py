"""The sandwich: chance, what was measured, and what the guarantee allows, for every policy on one axis, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from scipy.special import ndtri

from dpguard.policy.gaussian import success_bound
from dpguard.report.board import CONTROL, Frontier, Measure, Row
from dpguard.report.style import Band, band
from dpguard.report.text import metric_name
from dpguard.stats import Interval

LISTED = 30
"""With more policies than this, only the front, the control and what broke its bound are listed."""
CERTAIN = 1 - 1e-9
"""A bound from here on allows everything."""
LABELLED = 24
"""With more points than this over noise, only those of the front and what broke its bound are named."""


@dataclass(frozen=True)
class Slice:
    """One policy and metric: chance <= measured <= bound.

    Attributes:
        number: the policy's row in the table, from 1.
        policy: its name.
        band: of its epsilon; None without a formal guarantee.
        measured: largest mean over attacks and positions; None where it was not measured.
        chance: of a guess that saw no message, on public texts; where that was not measured, the prior attack's mean on
            the same messages; None without either.
        bound: the most that the guarantee allows; None without one.
        broken: the measured lower limit, corrected for all that was looked at, is above the bound.
    """

    number: int
    policy: str
    band: Band | None
    measured: Interval | None
    chance: float | None
    bound: float | None
    broken: bool


@dataclass(frozen=True)
class Panel:
    """One metric of the sandwich, every policy in the study's order."""

    metric: str
    name: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Sandwich:
    """What the sandwich contains; ``left_out`` counts the policies that there was no room for."""

    panels: tuple[Panel, ...]
    left_out: int

    @property
    def messages(self) -> bool:
        """Whether some messages held several texts, so that messages are what is counted."""
        return any(part.measured and part.measured.texts for panel in self.panels for part in panel.slices)

    @property
    def conditional(self) -> bool:
        """Whether any bound is drawn, which is conditional on the chance that was measured."""
        return any(part.bound is not None for panel in self.panels for part in panel.slices)


def sandwich_content(frontier: Frontier, metrics: Sequence[str] = ()) -> Sandwich:
    """Compute the sandwich.

    Args:
        frontier: of the study.
        metrics: which metrics get a panel; by default the study's and exact match, which is identification in the
            closed world.
    """
    shown = metrics or [
        name
        for name in dict.fromkeys((frontier.leakage_metric, "exact_match"))
        if name == frontier.leakage_metric or name in frontier.metrics
    ]
    rows = list(enumerate(frontier.rows, 1))
    if len(rows) > LISTED:
        rows = [(n, row) for n, row in rows if row.on_front or row.policy == CONTROL or row.broken][:LISTED]
    panels = tuple(
        Panel(name, _named(name, frontier), tuple(_slice(n, row, name) for n, row in rows)) for name in shown
    )
    return Sandwich(tuple(panels), len(frontier.rows) - len(rows))


def _named(metric: str, frontier: Frontier) -> str:
    """The metric in words; in the closed world exact match is identification."""
    among = max((row.candidates for row in frontier.rows), default=0)
    return f"identified among {among}" if among and metric == "exact_match" else metric_name(metric)


def _slice(number: int, row: Row, metric: str) -> Slice:
    found = row.measures.get(metric)
    if found is None:
        return Slice(number, row.policy, band(row.epsilon), None, None, None, broken=False)
    return Slice(
        number, row.policy, band(row.epsilon), found.measured, chance_of(found), found.bound, broken=found.broken
    )


def chance_of(found: Measure) -> float | None:
    """What a guess scores: measured on public texts, else the prior attack's mean on the same messages."""
    if found.chance is not None:
        return found.chance
    return found.floor.value if found.floor else None


@dataclass(frozen=True)
class Violation:
    """A bound that was broken, for the banner: ``proven`` is the corrected lower limit of what was measured."""

    policy: str
    metric: str
    proven: float
    bound: float
    upper: float
    n: int


def violations(frontier: Frontier) -> list[Violation]:
    """Every measure of which more was reached than the guarantee allows."""
    return [
        Violation(row.policy, m.metric, m.proven or 0.0, m.bound or 0.0, m.upper or 0.0, m.measured.n)
        for row in frontier.rows
        for m in row.broken
    ]


@dataclass(frozen=True)
class Noised:
    """One policy in the picture over noise."""

    number: int
    policy: str
    sigma: float
    measured: Interval
    bound: float | None
    band: Band | None
    broken: bool
    labelled: bool


@dataclass(frozen=True)
class OverNoise:
    """Leakage over the effective noise multiplier.

    Attributes:
        points: policies with a formal guarantee, least noise first.
        curves: bounds as lines (sigma, bound): one for each number of messages that an attacker saw.
        floor: of the prior attack on the study's messages.
        chance: of a guess on public texts, from whose upper limit the bound starts.
        metric: in words.
    """

    points: tuple[Noised, ...]
    curves: tuple[tuple[tuple[float, float], ...], ...]
    floor: float | None
    chance: float | None
    metric: str


def over_noise_content(frontier: Frontier) -> OverNoise | None:
    """Compute the picture over noise; None with fewer than two policies that have noise, a guarantee and a measure."""
    metric = frontier.leakage_metric
    points: list[Noised] = []
    starts: list[tuple[float, float, float]] = []
    for number, row in enumerate(frontier.rows, 1):
        found = row.measures.get(metric)
        if found is None or row.sigma_eff is None or not 0 < row.sigma_eff < math.inf:
            continue
        colour, broken = band(row.epsilon), found.broken
        point = Noised(number, row.policy, row.sigma_eff, found.measured, found.bound, colour, broken, labelled=True)
        points.append(point)
        if found.bound is not None and found.upper is not None and found.upper > 0:
            starts.append((row.sigma_eff, found.upper, found.bound))
    if len({point.sigma for point in points}) < 2:
        return None
    named = {point.number for point in points if frontier.rows[point.number - 1].on_front or point.broken}
    if len(points) > LABELLED:
        points = [replace(point, labelled=point.number in named) for point in points]
    points.sort(key=lambda point: (point.sigma, point.number))
    chances = [m.chance for row in frontier.rows if (m := row.measures.get(metric)) and m.chance is not None]
    return OverNoise(
        tuple(points),
        _curves(starts, points[0].sigma, points[-1].sigma),
        frontier.floor.value if frontier.floor else None,
        chances[0] if chances else None,
        metric_name(metric),
    )


def _curves(
    starts: Sequence[tuple[float, float, float]], least: float, most: float
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """The closed form through the recorded bounds, over the whole range of noise.

    A bound is Phi(Phi^-1(kappa) + c / sigma), c being the root of the number of messages seen: recorded bounds tell c.
    A bound of 1 tells none: where no line goes through it, it is one for all noise.
    """
    inside = [(sigma, kappa, bound) for sigma, kappa, bound in starts if bound < CERTAIN]
    kinds = sorted({(kappa, round(sigma * float(ndtri(bound) - ndtri(kappa)), 6)) for sigma, kappa, bound in inside})
    steps = [least * (most / least) ** (n / 80) for n in range(81)]
    lines = [tuple((sigma, success_bound(kappa, c / sigma)) for sigma in steps) for kappa, c in kinds]
    whole = [(sigma, kappa) for sigma, kappa, bound in starts if bound >= CERTAIN]
    if any(all(success_bound(k, c / sigma) < 1 - 1e-6 for k, c in kinds if k == kappa) for sigma, kappa in whole):
        lines.append(tuple((sigma, 1.0) for sigma in steps))
    return tuple(line for line, _ in groupby(lines))
