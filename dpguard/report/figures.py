"""The pictures of a report as matplotlib axes, for notebooks and papers too.

    from dpguard.report import figures
    ax = figures.tradeoff("reports/demo")
    figures.save(ax, "tradeoff.pdf")

Each takes the folder of a study, a `StudyResult`, a `Frontier`, or a sequence of records, and draws onto ``ax`` where
that is given. What they show is computed apart: `figure_content`, `sandwich_content`, `attacks_content`,
`map_content`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpguard.errors import UserError, did_you_mean
from dpguard.report.attacks_content import attacks_content
from dpguard.report.board import Frontier
from dpguard.report.draw_attacks import draw_attacks
from dpguard.report.draw_map import draw_map
from dpguard.report.draw_sandwich import draw_bars, draw_over_noise, draw_panel, height, sandwich_legend
from dpguard.report.draw_tradeoff import draw_tradeoff
from dpguard.report.figure_content import leakage_content, tradeoff_content
from dpguard.report.files import write
from dpguard.report.frontier import frontier
from dpguard.report.map_content import LEAST, map_content
from dpguard.report.marks import new_axes, settle
from dpguard.report.result import StudyResult
from dpguard.report.sandwich_content import over_noise_content, sandwich_content
from dpguard.report.style import styled
from dpguard.report.svg import KINDS, to_bytes, to_svg
from dpguard.study.record import Record

Source = Frontier | StudyResult | Sequence[Record] | str | Path
FORMATS = ("svg", *KINDS)


def frontier_of(source: Source, metric: str | None = None) -> Frontier:
    """The frontier that a picture is drawn from.

    Args:
        source: a study's folder, its result, its frontier or its records.
        metric: leakage metric instead of the study's.

    Raises:
        UserError: a folder without records, or a metric that no record has.
    """
    if isinstance(source, Frontier):
        return source.by(metric) if metric else source
    if isinstance(source, StudyResult):
        return frontier(source, metric=metric)
    if isinstance(source, str | Path):
        from dpguard.study.store import Store

        with Store.open(Path(source)) as store:
            return frontier(StudyResult.read(store), metric=metric)
    return frontier(StudyResult({}, list(source)), metric=metric)


def tradeoff(
    source: Source, *, metric: str | None = None, ax: Axes | None = None, narrow: bool = False, chosen: str = ""
) -> Axes:
    """Draw leakage (x) against utility (y): intervals, front, ceiling and floor; colour is epsilon.

    A filled circle has a formal guarantee, an open diamond has none.

    Args:
        source: see `frontier_of`.
        metric: leakage metric instead of the study's.
        ax: where to draw; a new figure by default.
        narrow: for a column the width of a phone: points carry their row's number instead of a name.
        chosen: a policy that gets a ring.

    Returns:
        The axes; points have the ids ``point-1``, ``point-2``, ... as in the table.
    """
    content = tradeoff_content(frontier_of(source, metric))
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, 5.0 if narrow else 5.6)[0]
        draw_tradeoff(ax, content, narrow=narrow, chosen=chosen)
    return ax


def leakage(source: Source, *, metric: str | None = None, ax: Axes | None = None, narrow: bool = False) -> Axes:
    """Draw what every policy leaks, with intervals, over the floor. Arguments as for `tradeoff`."""
    content = leakage_content(frontier_of(source, metric))
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, height(len(content.bars), narrow=narrow))[0]
        draw_bars(ax, content, narrow=narrow)
        settle(ax)
    return ax


def sandwich(source: Source, *, metric: str | None = None, ax: Axes | None = None, narrow: bool = False) -> Axes:
    """Draw chance <= measured <= bound for every policy on one axis. Arguments as for `tradeoff`.

    Chance is what a guess scores on public texts, the bound the most that the guarantee allows from there. A policy
    without a guarantee has no bound; one that leaked more than its bound, beyond chance, is on red.
    """
    table = frontier_of(source, metric)
    content = sandwich_content(table, [table.leakage_metric])
    [panel] = content.panels
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, height(len(panel.slices), narrow=narrow))[0]
        draw_panel(ax, panel, narrow=narrow)
        sandwich_legend(ax, content.panels, narrow=narrow)
        settle(ax)
    return ax


def sandwich_panels(source: Source, *, narrow: bool = False) -> list[Axes]:
    """The sandwich of the study's metric and of exact match, side by side in one new figure."""
    content = sandwich_content(frontier_of(source))
    with styled(narrow):
        rows = len(content.panels[0].slices)
        axes = new_axes(narrow, height(rows, narrow=narrow), len(content.panels), share=True)
        for ax, panel in zip(axes, content.panels, strict=True):
            draw_panel(ax, panel, narrow=narrow)
        sandwich_legend(axes[0], content.panels, narrow=narrow)
        settle(axes[0])
    return axes


def over_noise(source: Source, *, metric: str | None = None, ax: Axes | None = None, narrow: bool = False) -> Axes:
    """Draw measured, bound and floor over the effective noise multiplier. Arguments as for `tradeoff`.

    Raises:
        UserError: fewer than two noise levels with a guarantee and measured leakage.
    """
    content = over_noise_content(frontier_of(source, metric))
    if content is None:
        raise UserError("fewer than two noise levels have a guarantee and measured leakage; expected a sweep of noise")
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, 4.6 if narrow else 4.8)[0]
        draw_over_noise(ax, content, narrow=narrow)
    return ax


def attacks(source: Source, *, metric: str | None = None, ax: Axes | None = None, narrow: bool = False) -> Axes:
    """Draw what each attack got from the same messages, policy by policy. Arguments as for `tradeoff`.

    Raises:
        UserError: fewer than two attacks read a message, or too many policies for one picture.
    """
    content = attacks_content(frontier_of(source, metric))
    if content is None:
        raise UserError("fewer than two attacks read a message, or there are more than 30 policies")
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, (1.6 if narrow else 1.0) + 0.36 * len(content.policies))[0]
        draw_attacks(ax, content, narrow=narrow)
        settle(ax)
    return ax


def map(
    source: Source,
    *,
    metric: str | None = None,
    of: Literal["leakage", "utility"] = "leakage",
    at: str = "",
    ax: Axes | None = None,
    narrow: bool = False,
) -> Axes:
    """Draw what each part of the model leaks when just that is shared, or is worth when just that is trained.

    Args:
        source: see `frontier_of`.
        metric: leakage metric instead of the study's.
        of: ``leakage`` or ``utility``.
        at: of leakage, only at this position in the training, such as ``start``; empty: the largest over all.
        ax: where to draw; a new figure by default.
        narrow: for a column the width of a phone.

    Raises:
        UserError: fewer than two policies share a single part of the model, or another ``of``, or a position at
            which they were not attacked.
    """
    if of not in ("leakage", "utility"):
        raise UserError(f"of is {of!r}, expected 'leakage' or 'utility'")
    content = map_content(frontier_of(source, metric))
    if content is None:
        raise UserError(f"fewer than {LEAST} policies share a single part as it is; expected some like block[0].mlp.in")
    if at and at not in content.positions:
        raise UserError(f"at is {at!r}{did_you_mean(at, content.positions)}")
    with styled(narrow):
        ax = ax if ax is not None else new_axes(narrow, 1.1 + 0.55 * len(content.rows))[0]
        draw_map(ax, content, of=of, narrow=narrow, at=at)
        settle(ax)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The figure that axes made here belong to."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes were removed from their figure")
    return figure


def image(ax: Axes, kind: str) -> bytes:
    """The figure of these axes as a file: the same bytes on every build, without dates.

    Raises:
        UserError: a format that is none of svg, png and pdf.
    """
    if kind not in FORMATS:
        raise UserError(f"figures cannot be written as {kind!r}; expected one of: {', '.join(FORMATS)}")
    return to_svg(figure_of(ax)).encode() if kind == "svg" else to_bytes(ax, kind)


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of these axes; the name's ending says how: .svg, .png or .pdf."""
    path = Path(path)
    write(path, image(ax, path.suffix.removeprefix(".").lower()))
