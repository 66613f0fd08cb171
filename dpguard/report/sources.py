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
    """Gaps of one leg with one reason: ``policies`` has, for each policy, which positions and seeds it lacks."""

    leg: str
    status: str
    reason: str
    policies: tuple[tuple[str, str], ...]


def grouped(gaps: Sequence[Gap]) -> list[Group]:
    """Gaps of one leg with one reason as one; failed ones first, then missing, then skipped."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for gap in gaps:
        places = found.setdefault((gap.leg, gap.status, gap.reason), {}).setdefault(gap.policy, [])
        if gap.where:
            places.append(gap.where)
    groups = [
        Group(*key, tuple((policy, _places(places)) for policy, places in policies.items()))
        for key, policies in found.items()
    ]
    order = ("failed", "missing", "skipped")
    return sorted(groups, key=lambda group: order.index(group.status))


def _places(places: Sequence[str]) -> str:
    """Positions and seeds in words; seeds alone are listed as one.

    >>> _places(["seed 0", "seed 1"]), _places(["end, seed 0"])
    ('seeds 0, 1', 'end, seed 0')
    """
    if len(places) > 1 and all(place.startswith("seed ") for place in places):
        return f"seeds {', '.join(place.removeprefix('seed ') for place in places)}"
    return "; ".join(places)


SHOWN = ("versions", "git", "device", "seed", "plan", "seconds", "cpu_seconds", "peak_mb", "started")
"""What a page says of where records come from: a failed cell's traceback and output may quote texts, paths, hosts."""


def provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Where the numbers come from: every value that occurs, totals for durations, the largest memory."""
    found: dict[str, set[str]] = {}
    totals, peak, starts = {"seconds": 0.0, "cpu_seconds": 0.0}, 0.0, []
    for record in records:
        for name, value in _flat({name: record.provenance[name] for name in SHOWN if name in record.provenance}):
            if name in totals:
                totals[name] += float(value)
            elif name == "peak_mb":
                peak = max(peak, float(value))
            elif name == "started":
                starts.append(visible(value))
            else:
                found.setdefault(visible(name), set()).add(plain(value))
    facts = [(name, ", ".join(sorted(values))) for name, values in sorted(found.items())]
    if starts:
        facts.append(("first cell started", min(starts)))
    for name, words in (("seconds", "time of all cells"), ("cpu_seconds", "of which on a processor")):
        if totals[name]:
            facts.append((words, f"{totals[name]:,.0f} s"))
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
