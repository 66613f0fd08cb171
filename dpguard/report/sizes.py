"""What the numbers rest on, in words: targets, messages, test texts and seeds, and where a policy has its own."""

from __future__ import annotations

from dpguard.report.board import Frontier, Row
from dpguard.report.text import count, number, span
from dpguard.stats import Interval


def leaked_from(interval: Interval) -> str:
    """What a leakage rests on.

    >>> leaked_from(Interval(0.5, 0.4, 0.6, 12)), leaked_from(Interval(0.5, 0.4, 0.6, 5, texts=25))
    ('12 targets', '25 targets in 5 messages')
    """
    if interval.texts:
        return f"{count(interval.texts, 'target')} in {count(interval.n, 'message')}"
    return count(interval.n, "target")


def sizes(table: Frontier) -> str:
    """What most rows rest on."""
    told = []
    leakages = [row.leakage for row in table.rows if row.leakage]
    utilities = [row.utility for row in table.rows if row.utility]
    if leakages:
        told.append(f"leakage: {_common(table)}, {count(max(i.seeds for i in leakages), 'seed')}")
    if utilities:
        n, seeds = max(i.n for i in utilities), max(i.seeds for i in utilities)
        told.append(f"utility: {count(n, 'test text')}, {count(seeds, 'seed')}")
    return "; ".join(told)


def _common(table: Frontier) -> str:
    """What the control's leakage rests on, or that of the first row that has one."""
    first = table.ceiling if table.ceiling and table.ceiling.leakage else None
    row = first or next((row for row in table.rows if row.leakage), None)
    return leaked_from(row.leakage) if row and row.leakage else ""


def own_sizes(table: Frontier) -> dict[str, str]:
    """Policy -> what its leakage rests on and what a guess reaches there, where that differs from most rows."""
    common = _common(table)
    return {row.policy: told for row in table.rows if (told := _own(row, common, table.floor))}


def _own(row: Row, common: str, floor: Interval | None) -> str:
    told = []
    if row.leakage and leaked_from(row.leakage) != common:
        told.append(leaked_from(row.leakage))
    if row.leakage and row.floor and floor and number(row.floor.value) != number(floor.value):
        told.append(f"floor {number(row.floor.value)} ({span(row.floor)})")
    return "; ".join(told)
