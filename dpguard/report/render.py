"""Records to a report: one HTML page, the same in Markdown, tables as CSV and LaTeX, figures as SVG, PNG and PDF.

Nothing here computes: the page is a template over `frontier`, `recommend` and `views`, so equal records give
equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dpguard.report import again, card, pdf, pictures, text
from dpguard.report.chance import measured_on, public_texts
from dpguard.report.differences import compared
from dpguard.report.figure_content import tradeoff_content
from dpguard.report.files import write
from dpguard.report.frontier import CONTROL, FLOOR, Frontier, frontier
from dpguard.report.latex import tables
from dpguard.report.missing import missing
from dpguard.report.page import dress, template
from dpguard.report.recommend import Caps, Recommendation, moved_cap, recommend
from dpguard.report.result import StudyResult
from dpguard.report.sandwich_content import over_noise_content, sandwich_content, violations
from dpguard.report.sizes import own_sizes, sizes
from dpguard.report.sources import provenance
from dpguard.report.svg import KINDS, Looks, to_bytes
from dpguard.report.views import policy_views


def render(result: StudyResult, folder: Path, *, metric: str | None = None) -> Path:
    """Write report.html, report.md, tables.tex, frontier.csv, the figures, and the card of the recommended policy.

    Args:
        result: the study and its records.
        folder: where to write; made when it is not there.
        metric: leakage metric instead of the study's.

    Returns:
        The path of report.html.

    Raises:
        UserError: a metric or a cap of the study that cannot be meant.
        OSError: the folder cannot be written.
    """
    table = frontier(result, metric=metric)
    caps = Caps.read(result.spec)
    decision = recommend(
        table, max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon
    )
    drawn = pictures.draw_all(table, decision.policy)
    others = pictures.tradeoffs(table, decision.policy)
    made = card.content(result, table, decision, decision.policy) if decision.policy else None
    context = _context(result, table, decision) | {
        "card": card.to_markdown(made) if made else "",
        "stacked": any(tradeoff_content(made).stacked for made in (table, *(other.table for other in others))),
        "by_attack": "attacks" in drawn,
        "maps": [found for name, found in drawn.items() if name.startswith("map")],
    }
    folder = Path(folder)
    for stale in (card.JSON, card.TEXT, pdf.NAME):
        (folder / stale).unlink(missing_ok=True)
    if made:
        card.write(made, folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    _write_figures(list(drawn.values()), folder / "figures")
    write(folder / "frontier.csv", table.to_csv())
    write(folder / "tables.tex", tables(context["views"], table, decision))
    write(folder / "report.md", template("report.md.j2", escape=False).render(context))
    page = folder / "report.html"
    write(page, template("report.html.j2", escape=True).render(context | _shown(context, table, drawn, others)))
    return page


def _write_figures(drawn: list[pictures.Drawn], folder: Path) -> None:
    for made in drawn:
        write(folder / f"{made.file}.svg", made.wide)
        for kind in KINDS:
            write(folder / f"{made.file}.{kind}", to_bytes(made.axes, kind))


def _shown(
    context: dict[str, Any], table: Frontier, drawn: dict[str, pictures.Drawn], others: list[pictures.Drawn]
) -> dict[str, Any]:
    """What only the page has: the pictures as parts of it, the contents, style and script."""
    looks = Looks()
    trades = [drawn["tradeoff"], *others] if "tradeoff" in drawn else []
    choices = [{"metric": made.table.leakage_metric, "drawn": made.on_page(looks)} for made in trades]
    points = [point.number for made in trades for point in tradeoff_content(made.table).points]
    shown = {name: made.on_page(looks) for name, made in drawn.items() if name != "tradeoff"}
    return {
        "pictures": shown,
        "choices": choices,
        "contents": _contents({*drawn, *_full(context)}),
        **dress(context["study"], sorted(set(points)), len(choices), looks.style()),
    }


CONTENTS: tuple[tuple[str, str, str | None], ...] = (
    ("tradeoff", "Trade-off", "tradeoff"),
    ("frontier", "Frontier", None),
    ("leaks", "Chance and bound", "sandwich"),
    ("map", "Map", "map"),
    ("differences", "Differences", "differences"),
    ("policies", "Policies", None),
    ("missing", "What is missing", "missing"),
    ("how", "How it was made", None),
)
"""Sections of the page: anchor, words, and the picture or list without which it is not there."""


def _contents(there: Collection[str]) -> list[tuple[str, str]]:
    """Anchor and words of the sections of a page; the map leads where nothing can be weighed against its worth."""
    found = [(anchor, words) for anchor, words, needs in CONTENTS if needs is None or needs in there]
    return found if "tradeoff" in there else sorted(found, key=lambda section: section[0] != "map")


def _full(context: dict[str, Any]) -> list[str]:
    lists = {
        "missing": context["missing"].broken or context["missing"].skipped,
        "differences": any(found.rows for found in context["comparisons"]),
    }
    return [name for name, there in lists.items() if there]


def _public_texts(result: StudyResult) -> int:
    return public_texts(r.result for r in result.records if r.cell.leg == "guarantee")


def _context(result: StudyResult, table: Frontier, decision: Recommendation) -> dict[str, Any]:
    views = policy_views(result, table)
    yaml = text.visible_lines(result.study.get("yaml", ""))
    return {
        "study": text.visible(result.study.get("name", "")),
        "question": text.visible(result.study.get("question") or "What may a client share, and what does it cost?"),
        "decision": decision,
        "chosen": next((view for view in views if view.row.policy == decision.policy), None),
        "frontier": table,
        "views": views,
        "missing": missing(table, decision, again.left_out(result)),
        "reproduce": again.reproduce(result),
        "violations": violations(table),
        "sandwich": sandwich_content(table),
        "over_noise": over_noise_content(table),
        "saw": next((row.saw for row in table.rows if row.measures), "one message"),
        "closed": any(row.candidates for row in table.rows),
        "chance": measured_on(_public_texts(result)),
        "comparisons": compared(result, table, decision.policy),
        "absent": tradeoff_content(table).absent,
        "crowded": not all(point.labelled for point in tradeoff_content(table).points),
        "sizes": sizes(table),
        "own_sizes": own_sizes(table),
        "synthetic": result.synthetic,
        "shows_text": result.shows_text,
        "provenance": provenance(result.records),
        "yaml": yaml,
        "fence": text.fence(yaml),
        "file_name": (re.sub(r"[^A-Za-z0-9_-]+", "-", str(result.study.get("name", "")))[:60].strip("-") or "study")
        + ".yaml",
        "moved_cap": moved_cap(result.spec, table.leakage_metric, decision.caps),
        "control": CONTROL,
        "prior": FLOOR,
    }
