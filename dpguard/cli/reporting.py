"""``dpguard report`` and ``recommend``: from records to a page and to a decision. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from dpguard.cli.console import console
from dpguard.report.frontier import Frontier, frontier
from dpguard.report.recommend import Caps, Recommendation, recommend
from dpguard.report.result import StudyResult
from dpguard.report.terminal import terminal_table
from dpguard.study.store import Store


def read_result(folder: Path) -> StudyResult:
    """The records of a folder."""
    with Store.open(folder) as store:
        return StudyResult.read(store)


def render_report(folder: Path) -> Path:
    """Render report.html, report.md, frontier.csv and figures; print decision, frontier and path."""
    from dpguard.report.render import render

    result = read_result(folder)
    page = render(result, folder)
    found = frontier(result)
    decision = _decide(found, Caps.read(result.spec))
    out = console()
    out.print()
    out.print(terminal_table(found, out.width))
    out.print()
    out.print(decision.sentence, style="bold", markup=False)
    out.print(f"report: {page}", markup=False)
    return page


def _decide(found: Frontier, caps: Caps) -> Recommendation:
    return recommend(found, max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon)


def print_recommendation(
    folder: Path,
    *,
    max_leakage: float | None,
    min_utility: float | None,
    max_epsilon: float | None,
    as_json: bool,
) -> None:
    """Recommend under the caps given here; those of the study stand in where none is given."""
    result = read_result(folder)
    found = frontier(result)
    given = {"max_leakage": max_leakage, "min_utility": min_utility, "max_epsilon": max_epsilon}
    asked = {name: value for name, value in given.items() if value is not None}
    caps = Caps(**asked) if asked else Caps.read(result.spec)
    decision = _decide(found, caps)
    if as_json:
        plain = {"verdict": decision.verdict, "policy": decision.policy, "sentence": decision.sentence}
        print(json.dumps(plain, indent=2))
        return
    out = console()
    out.print(decision.sentence, style="bold", markup=False)
    for line in (*decision.why, *decision.limits, *decision.sensitivity):
        out.print(f"- {line}", markup=False)
    out.print()
    out.print(terminal_table(found, out.width))
