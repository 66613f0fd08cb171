"""Records to a report: one HTML page, the same in Markdown, the frontier as CSV, the figures as SVG.

Nothing here computes: the page is a template over `frontier`, `recommend` and `views`, so equal records give
equal bytes.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpguard.report import pictures, text
from dpguard.report.figure_content import leakage_content, tradeoff_content
from dpguard.report.frontier import CONTROL, FLOOR, Frontier, frontier
from dpguard.report.recommend import Caps, Recommendation, recommend
from dpguard.report.result import StudyResult
from dpguard.report.sources import grouped, provenance
from dpguard.report.style import BANDS
from dpguard.report.views import policy_views


def render(result: StudyResult, folder: Path) -> Path:
    """Write report.html, report.md, frontier.csv and figures/*.svg.

    Args:
        result: the study and its records.
        folder: where to write; made when it is not there.

    Returns:
        The path of report.html.

    Raises:
        UserError: a metric or a cap of the study that cannot be meant.
        OSError: the folder cannot be written.
    """
    table = frontier(result)
    caps = Caps.read(result.spec)
    decision = recommend(
        table, max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon
    )
    drawn = pictures.drawn(result, table)
    context = {**_context(result, table, decision), "pictures": pictures.on_page(drawn, table)}
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, (wide, _) in drawn.items():
        _write(folder / "figures" / f"{name}.svg", wide)
    _write(folder / "frontier.csv", table.to_csv())
    _write(folder / "report.md", _template("report.md.j2", escape=False).render(context))
    page = folder / "report.html"
    _write(page, _template("report.html.j2", escape=True).render({**context, **_styles()}))
    return page


def _write(path: Path, content: str) -> None:
    """Write beside and move in place, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(content, encoding="utf-8", newline="\n")
    beside.replace(path)


def _template(name: str, *, escape: bool) -> Any:
    loader = PackageLoader("dpguard.report", "templates")
    environment = Environment(
        loader=loader,
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "visible": text.visible,
        "name": lambda value: text.visible(value, limit=pictures.NAME_LENGTH),
        "number": text.number,
        "span": text.span,
        "epsilon": text.epsilon,
        "percent": text.percent,
        "metric": text.metric_name,
        "at": text.at_name,
        "md": text.markdown,
    }
    environment.globals |= {"count": text.count}
    return environment.get_template(name)


def _context(result: StudyResult, table: Frontier, decision: Recommendation) -> dict[str, Any]:
    views = policy_views(result, table)
    yaml = text.visible_lines(result.study.get("yaml", ""))
    groups = grouped(table.gaps)
    return {
        "study": text.visible(result.study.get("name", "")),
        "question": text.visible(result.study.get("question") or "What may a client share, and what does it cost?"),
        "decision": decision,
        "chosen": next((view for view in views if view.row.policy == decision.policy), None),
        "frontier": table,
        "views": views,
        "broken": [group for group in groups if group.status != "skipped"],
        "skipped": [group for group in groups if group.status == "skipped"],
        "violations": [row for row in table.rows if row.broken],
        "kappas": sorted({row.kappa for row in table.rows if row.kappa is not None}),
        "left_out": leakage_content(table).left_out,
        "absent": tradeoff_content(table).absent,
        "crowded": not all(point.labelled for point in tradeoff_content(table).points),
        "sizes": _sizes(table),
        "synthetic": result.synthetic,
        "shows_text": result.shows_text,
        "provenance": provenance(result.records),
        "yaml": yaml,
        "fence": text.fence(yaml),
        "control": CONTROL,
        "prior": FLOOR,
    }


def _sizes(table: Frontier) -> str:
    """What the numbers rest on, in words."""
    told = []
    leakages = [row.leakage for row in table.rows if row.leakage]
    utilities = [row.utility for row in table.rows if row.utility]
    if leakages:
        n, seeds = max(i.n for i in leakages), max(i.seeds for i in leakages)
        told.append(f"leakage: {text.count(n, 'target')}, {text.count(seeds, 'seed')}")
    if utilities:
        n, seeds = max(i.n for i in utilities), max(i.seeds for i in utilities)
        told.append(f"utility: {text.count(n, 'test text')}, {text.count(seeds, 'seed')}")
    return "; ".join(told)


def _styles() -> dict[str, Any]:
    """The style sheet, and the steps of the epsilon scale by day and by night."""
    sheet = (files("dpguard.report") / "templates" / "style.css").read_text("utf-8")
    return {
        "css": Markup(sheet),
        "bands_day": Markup("".join(f"--eps-{n}:{step.colour};" for n, step in enumerate(BANDS))),
        "bands_night": Markup("".join(f"--eps-{n}:{step.night};" for n, step in enumerate(BANDS))),
    }
