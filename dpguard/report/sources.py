"""Where a report's numbers come from, and which cells gave none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.report.frontier import Gap
from dpguard.report.text import plain, visible
from dpguard.study.record import Record


@dataclass(frozen=True)
class Group:
    """Gaps of one leg of one policy with one reason, counted."""

    policy: str
    leg: str
    status: str
    reason: str
    where: tuple[str, ...]


def grouped(gaps: Sequence[Gap]) -> list[Group]:
    """Gaps that differ only in seed or position as one; failed ones first, then missing, then skipped."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for gap in gaps:
        found.setdefault((gap.policy, gap.leg, gap.status, gap.reason), []).append(gap.where)
    order = ("failed", "missing", "skipped")
    groups = [Group(*key, tuple(place for place in where if place)) for key, where in found.items()]
    return sorted(groups, key=lambda group: order.index(group.status) if group.status in order else 0)


def provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Where the numbers come from: every value that occurs, totals for durations, the largest memory."""
    found: dict[str, set[str]] = {}
    seconds, peak, starts = 0.0, 0.0, []
    for record in records:
        for name, value in _flat(record.provenance):
            if name == "seconds":
                seconds += float(value)
            elif name == "peak_mb":
                peak = max(peak, float(value))
            elif name == "started":
                starts.append(visible(value))
            else:
                found.setdefault(visible(name), set()).add(plain(value))
    facts = [(name, ", ".join(sorted(values))) for name, values in sorted(found.items())]
    if starts:
        facts.append(("first cell started", min(starts)))
    if seconds:
        facts.append(("computing time of all cells", f"{seconds:,.0f} s"))
    if peak:
        facts.append(("most memory of a cell", f"{peak:,.0f} MB"))
    return facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, "" if name == "versions" else f"{prefix}{name} ")
        elif value is not None:
            flat.append((f"{prefix}{name}", value))
    return flat
