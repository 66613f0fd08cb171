"""The pictures of a report: which there are, what each is called, and how each becomes files and parts of the page.

To add a picture: a function that returns matplotlib axes, one entry in `PICTURES`, and a template part that shows it
with the macro ``picture``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from dpguard.report import figures, text
from dpguard.report.figure_content import tradeoff_content
from dpguard.report.frontier import Frontier, Row
from dpguard.report.result import StudyResult
from dpguard.report.svg import Mark, inline, to_svg

NAME_LENGTH = 80
"""Longer policy names are cut where they stand in line with others, and printed in full in their own part."""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its files, and in templates.
        title: what it shows, for screen readers.
        draw: (study, frontier, narrow) -> axes, or None when there is nothing to draw.
        marks: (frontier) -> what its points say and where they lead, by the point's group id.
    """

    name: str
    title: str
    draw: Callable[[StudyResult, Frontier, bool], Axes | None]
    marks: Callable[[Frontier], dict[str, Mark]] | None = None


def _marks(table: Frontier) -> dict[str, Mark]:
    by_number = dict(enumerate(table.rows, 1))
    return {
        f"point-{point.number}": Mark(f"#policy-{point.number}", said(by_number[point.number], table), point.number)
        for point in tradeoff_content(table).points
    }


PICTURES = (
    Picture(
        "tradeoff",
        "Leakage against utility, one point for every policy",
        lambda _, table, narrow: figures.tradeoff(table, narrow=narrow),
        _marks,
    ),
    Picture(
        "leakage",
        "Leakage and exact recovery of every policy",
        lambda _, table, narrow: figures.leakage(table, narrow=narrow)[0],
    ),
)


def drawn(result: StudyResult, table: Frontier) -> dict[str, tuple[str, str]]:
    """Every picture as SVG: name -> (wide, narrow); those with nothing to draw are absent."""
    found = {}
    for picture in PICTURES:
        shapes = [picture.draw(result, table, narrow) for narrow in (False, True)]
        svgs = [to_svg(figures.figure_of(axes)) for axes in shapes if axes is not None]
        if len(svgs) == 2:
            found[picture.name] = (svgs[0], svgs[1])
    return found


def on_page(svgs: Mapping[str, tuple[str, str]], table: Frontier) -> dict[str, Markup]:
    """The pictures as parts of the page, wide and narrow together; points lead to their policies."""
    found = {}
    for picture in PICTURES:
        if picture.name not in svgs:
            continue
        marks = picture.marks(table) if picture.marks else None
        parts = [
            inline(svg, prefix=f"{picture.name}-{shape}-", title=picture.title, css_class=shape, marks=marks)
            for svg, shape in zip(svgs[picture.name], ("wide", "narrow"), strict=True)
        ]
        found[picture.name] = Markup("\n").join(Markup(part) for part in parts)
    return found


def said(row: Row, table: Frontier) -> str:
    """A point in words, for the tooltip and the screen reader."""
    leakage, utility = row.leakage, row.utility
    guarantee = f"epsilon {text.epsilon(row.epsilon)}" if row.formal else "no formal guarantee"
    return (
        f"{text.visible(row.policy, limit=NAME_LENGTH)}: leakage "
        f"{text.number(leakage.value if leakage else None)} ({text.span(leakage)}), "
        f"{text.metric_name(table.utility_metric)} {text.number(utility.value if utility else None)} "
        f"({text.span(utility)}), {guarantee}"
    )
