"""The pictures of a report: which there are, what each is called, and how each becomes files and parts of the page.

To add a picture: a function that returns matplotlib axes, one entry in `PICTURES`, and a template part that shows it
with the macro ``picture``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes

from dpguard.report import figures, text
from dpguard.report.attacks_content import attacks_content
from dpguard.report.figure_content import tradeoff_content
from dpguard.report.frontier import Frontier, Row
from dpguard.report.map_content import Map, map_content
from dpguard.report.sandwich_content import over_noise_content
from dpguard.report.svg import Looks, Mark, inline, to_svg

MANY = 150
"""With more policies than this the trade-off is drawn by the study's leakage metric alone."""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its files, and in templates.
        title: what it shows, for screen readers.
        draw: (frontier, narrow, recommended policy) -> axes, or None when there is nothing to draw.
        marks: (frontier) -> what its points say and where they lead, by the point's group id.
    """

    name: str
    title: str
    draw: Callable[[Frontier, bool, str], Axes | None]
    marks: Callable[[Frontier], dict[str, Mark]] | None = None


def _marks(table: Frontier) -> dict[str, Mark]:
    by_number = dict(enumerate(table.rows, 1))
    return {
        f"point-{point.number}": Mark(f"#policy-{point.number}", said(by_number[point.number], table), point.number)
        for point in tradeoff_content(table).points
    }


def _panels(table: Frontier, narrow: bool) -> Axes:
    return figures.sandwich_panels(table, narrow=narrow)[0]


def _over_noise(table: Frontier, narrow: bool) -> Axes | None:
    return figures.over_noise(table, narrow=narrow) if over_noise_content(table) else None


def _map(of: Literal["leakage", "utility"]) -> Callable[[Frontier, bool, str], Axes | None]:
    def draw(table: Frontier, narrow: bool, _: str) -> Axes | None:
        content = map_content(table)
        if content is None or (of == "utility" and not any(cell.utility for cell in content.cells.values())):
            return None
        return figures.map(table, of=of, narrow=narrow, at=_first(content) if of == "leakage" else "")

    return draw


def _first(content: Map) -> str:
    """Where messages of several positions were attacked every one has a map of its own, and this has the first."""
    return content.positions[0] if len(content.positions) > 1 else ""


def _later_maps(table: Frontier) -> list[Picture]:
    """The maps of the positions after the first."""

    def draw(at: str) -> Callable[[Frontier, bool, str], Axes]:
        return lambda table, narrow, _: figures.map(table, narrow=narrow, at=at)

    content = map_content(table)
    title = "What each part of the model leaks when just that is shared"
    return [
        Picture("map_" + re.sub("[^a-z0-9]+", "-", at.lower()), f"{title}: {text.at_name(at)}", draw(at))
        for at in (content.positions[1:] if content else ())
    ]


PICTURES = (
    Picture(
        "tradeoff",
        "Leakage against utility, one point for every policy",
        lambda table, narrow, chosen: figures.tradeoff(table, narrow=narrow, chosen=chosen) if table.trades else None,
        _marks,
    ),
    Picture(
        "sandwich",
        "Chance, measured leakage and bound of every policy",
        lambda table, narrow, _: _panels(table, narrow),
    ),
    Picture(
        "over_noise",
        "Measured leakage, bound and floor over the noise",
        lambda table, narrow, _: _over_noise(table, narrow),
    ),
    Picture(
        "attacks",
        "What each attack got from the same messages, policy by policy",
        lambda table, narrow, _: figures.attacks(table, narrow=narrow) if attacks_content(table) else None,
    ),
    Picture("map", "What each part of the model leaks when just that is shared", _map("leakage")),
    Picture("map_utility", "What each part of the model is worth when just that is trained", _map("utility")),
)


@dataclass(frozen=True)
class Drawn:
    """A picture as SVG, in the form of its own file.

    Attributes:
        picture: which.
        table: the frontier that it shows.
        wide: for a page of text.
        narrow: for a column the width of a phone.
        file: name of its files, without an ending.
        axes: the wide form, for other kinds of files.
    """

    picture: Picture
    table: Frontier
    wide: str
    narrow: str
    file: str
    axes: Axes

    def on_page(self, looks: Looks) -> Markup:
        """Both forms as parts of the page, with classes from ``looks``; points lead to their policies."""
        marks = self.picture.marks(self.table) if self.picture.marks else None
        parts = [
            inline(svg, prefix=f"{self.file}-{shape[0]}-", title=self.picture.title, css_class=shape, marks=marks)
            for svg, shape in ((self.wide, "wide"), (self.narrow, "narrow"))
        ]
        return Markup("\n").join(Markup(looks.apply(part)) for part in parts)


def draw_all(table: Frontier, chosen: str = "") -> dict[str, Drawn]:
    """Every picture that has something to draw, by name; ``chosen`` is the recommended policy."""
    found = {}
    for picture in (*PICTURES[:-1], *_later_maps(table), PICTURES[-1]):
        made = _drawn(picture, table, picture.name, chosen)
        if made:
            found[picture.name] = made
    return found


def tradeoffs(table: Frontier, chosen: str = "") -> list[Drawn]:
    """The trade-off by every other leakage metric that the records have."""
    if len(table.rows) > MANY:
        return []
    found = []
    for metric in table.metrics[1:]:
        other = table.by(metric)
        if any(row.leakage and row.utility for row in other.rows):
            made = _drawn(PICTURES[0], other, f"tradeoff-{metric}", chosen)
            found += [made] if made else []
    return found


def _drawn(picture: Picture, table: Frontier, file: str, chosen: str) -> Drawn | None:
    wide, narrow = (picture.draw(table, narrow, chosen) for narrow in (False, True))
    if wide is None or narrow is None:
        return None
    svgs = [to_svg(figures.figure_of(axes)) for axes in (wide, narrow)]
    return Drawn(picture, table, svgs[0], svgs[1], file, wide)


def said(row: Row, table: Frontier) -> str:
    """A point in words, for the tooltip and the screen reader."""
    leakage, utility = row.leakage, row.utility
    guarantee = f"epsilon {text.epsilon(row.epsilon)}" if row.formal else "no formal guarantee"
    return (
        f"{text.name(row.policy)}: leakage "
        f"{text.number(leakage.value if leakage else None)} ({text.span(leakage)}), "
        f"{text.metric_name(table.utility_metric)} {text.number(utility.value if utility else None)} "
        f"({text.span(utility)}), {guarantee}"
    )
