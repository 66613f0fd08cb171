"""What a report lacks, and what that means for its decision: content of the first screen."""

from __future__ import annotations

from dataclasses import dataclass

from dpguard.report.board import CONTROL, Frontier
from dpguard.report.recommend import Recommendation
from dpguard.report.sources import Group, grouped
from dpguard.report.text import count, visible

NAMED = 6
"""How many policies a sentence names before it counts the others."""


@dataclass(frozen=True)
class Missing:
    """Cells without a result, and policies without cells.

    Attributes:
        results: how many failed or have not run.
        broken: those, by reason.
        skipped: cells that have no answer by their nature, by reason.
        meaning: what it means for the decision, in sentences; empty when nothing is missing.
        left_out: which policies of the study were not asked for, and what that means; empty where all were.
    """

    results: int
    broken: tuple[Group, ...]
    skipped: tuple[Group, ...]
    meaning: tuple[str, ...]
    left_out: str


def missing(table: Frontier, decision: Recommendation, left_out: str = "") -> Missing:
    """Find every gap of the frontier and say what it means for the decision.

    Args:
        table: the frontier.
        decision: on it.
        left_out: which policies of the study were not asked for (`again.left_out`).
    """
    groups = grouped(table.gaps)
    broken = tuple(group for group in groups if group.status != "skipped")
    skipped = tuple(group for group in groups if group.status == "skipped")
    results = sum(1 for gap in table.gaps if gap.status != "skipped")
    return Missing(results, broken, skipped, tuple(_meaning(table, decision)), _others(left_out, decision))


def _others(left_out: str, decision: Recommendation) -> str:
    """The policies that were not asked for, with what they might have changed."""
    might = {"recommended": "been better", "none qualifies": "qualified"}.get(decision.verdict)
    return f"{left_out} One of them might have {might}." if left_out and might else left_out


def _meaning(table: Frontier, decision: Recommendation) -> list[str]:
    hurt = [row.policy for row in table.rows if row.gaps and None in (row.leakage, row.utility, row.epsilon)]
    if not hurt:
        return []
    if CONTROL in hurt and decision.verdict == "no control":
        return ["The undefended control is among them, so nothing can be concluded about any policy."]
    named = ", ".join(visible(name, limit=60) for name in hurt[:NAMED])
    more = f" and {count(len(hurt) - NAMED, 'policy', 'policies')} more" if len(hurt) > NAMED else ""
    told = [f"Not considered in the decision: {named}{more}."]
    if decision.policy:
        told.append(
            f"{visible(decision.policy, limit=60)} keeps every cap whatever these would have given; "
            "one of them might have been better."
        )
    elif decision.verdict == "none qualifies":
        told.append("One of them might have qualified.")
    return told
