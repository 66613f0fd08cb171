"""Two or more studies side by side: what differs between them first, then the same policies and their differences.

Nothing is refused. Figures that do not measure the same thing (other texts, another panel, other targets) are put side
by side all the same, without a difference, and the reason is said.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.errors import UserError
from dpguard.report.frontier import Frontier, Row, frontier
from dpguard.report.result import StudyResult
from dpguard.report.text import plain, visible
from dpguard.stats import Interval
from dpguard.study.record import Cell, canonical

LEAKAGE_TERMS = {
    "data hash": "other texts",
    "leakage panel hash": "another panel of attacks",
    "leakage panel attacks": "other attacks",
    "leakage targets": "another number of targets",
    "leakage batch_size": "another batch size",
    "leakage at": "messages from other places in the training",
    "leakage metric": "another metric",
}
"""Settings without which two leakages do not measure the same thing, and how that is said."""
LEGS = ("leakage", "utility", "guarantee")
NONE = "–"
Differs = tuple[str, str, str]
"""What is not equal, in the first study, in the other."""
UTILITY_TERMS = {"data hash": "other texts", "utility metric": "another metric"}


@dataclass(frozen=True)
class Pair:
    """One policy in both studies.

    Attributes:
        first: its row in the first study.
        second: its row in the other.
        leakage: second minus first, or None where that means nothing.
        utility: the same.
    """

    first: Row
    second: Row
    leakage: Interval | None
    utility: Interval | None

    @property
    def name(self) -> str:
        """What it is called; both names where the studies do not agree."""
        one, two = self.first.policy, self.second.policy
        return one if one == two else f"{one} / {two}"


@dataclass(frozen=True)
class Against:
    """One study against the first.

    Attributes:
        label: what it is called here.
        differs: (what, in the first, in this one) for everything that is not equal.
        leakage_reasons: why leakages are not comparable; empty when they are.
        utility_reasons: the same for utilities.
        pairs: the policies of both, by table, in the first study's order.
        only_first: policies that only the first has.
        only_second: policies that only this one has.
    """

    label: str
    differs: tuple[Differs, ...]
    leakage_reasons: tuple[str, ...]
    utility_reasons: tuple[str, ...]
    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The first study, and every other one against it."""

    label: str
    leakage_metric: str
    utility_metric: str
    others: tuple[Against, ...]


def compare(studies: Sequence[tuple[str, StudyResult]]) -> Comparison:
    """Compare every study with the first one, by the first one's metrics.

    Args:
        studies: (label, study) for two or more.

    Raises:
        UserError: fewer than two studies.
    """
    if len(studies) < 2:
        raise UserError("one study was given, expected two or more to compare")
    label, first = studies[0]
    table = frontier(first)
    others = tuple(_against(first, table, other_label, other) for other_label, other in studies[1:])
    return Comparison(label, table.leakage_metric, table.utility_metric, others)


def difference(first: Interval | None, second: Interval | None) -> Interval | None:
    """``second - first`` from two intervals of independent estimates.

    Source: Zou and Donner, Construction of confidence limits about effect measures, Statistics in Medicine 27, 2008.
    Where both rest on the same targets the true interval is narrower.

    >>> found = difference(Interval(0.5, 0.4, 0.6, 9), Interval(0.7, 0.6, 0.8, 9))
    >>> round(found.low, 3), round(found.high, 3)
    (0.059, 0.341)
    """
    if first is None or second is None:
        return None
    gap = second.value - first.value
    down = math.hypot(second.value - second.low, first.high - first.value)
    up = math.hypot(second.high - second.value, first.value - first.low)
    return Interval(gap, gap - down, gap + up, min(first.n, second.n), min(first.seeds, second.seeds))


def _against(first: StudyResult, table: Frontier, label: str, other: StudyResult) -> Against:
    other_table = _frontier_like(other, table)
    differs = _differences(_terms(first, table), _terms(other, other_table))
    changed = {name for name, _, _ in differs}
    leakage_reasons = _reasons(changed, LEAKAGE_TERMS)
    if any(name.startswith("leakage threat") for name in changed):
        leakage_reasons += ("another threat model",)
    utility_reasons = _reasons(changed, UTILITY_TERMS)
    tables, other_tables = _by_table(first, table), _by_table(other, other_table)
    pairs = tuple(
        Pair(
            row, other_tables[key],
            None if leakage_reasons else difference(row.leakage, other_tables[key].leakage),
            None if utility_reasons else difference(row.utility, other_tables[key].utility),
        )
        for key, row in tables.items()
        if key in other_tables
    )  # fmt: skip
    return Against(
        label,
        _said_once(differs),
        leakage_reasons,
        utility_reasons,
        pairs,
        tuple(row.policy for key, row in tables.items() if key not in other_tables),
        tuple(row.policy for key, row in other_tables.items() if key not in tables),
    )


def _frontier_like(result: StudyResult, table: Frontier) -> Frontier:
    """By the first study's metrics where the records have them, else by the study's own."""
    try:
        return frontier(result, metric=table.leakage_metric, utility_metric=table.utility_metric)
    except UserError:
        return frontier(result)


def _reasons(changed: set[str], terms: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words for name, words in terms.items() if name in changed))


def _by_table(result: StudyResult, table: Frontier) -> dict[str, Row]:
    """Rows by what the policy does; by their name too where several do the same under settings of their own."""
    tables = {cell.policy: canonical(cell.table) for cell in _cells(result)}
    many = Counter(tables.values())
    alike = {policy: found if many[found] == 1 else f"{found} {policy}" for policy, found in tables.items()}
    return {alike.get(row.policy, f"name {row.policy}"): row for row in table.rows}


def _cells(result: StudyResult) -> list[Cell]:
    return [*(record.cell for record in result.records), *result.planned]


def _terms(result: StudyResult, table: Frontier) -> dict[str, str]:
    """Everything that the figures rest on but the policies: name -> every value that occurs."""
    found: dict[str, set[str]] = {
        "leakage metric": {table.leakage_metric},
        "utility metric": {table.utility_metric},
    }
    for cell in _cells(result):
        for name, value in _flat(cell.model, "model"):
            found.setdefault(name, set()).add(value)
        for name, value in _flat(cell.data, "data"):
            found.setdefault(name, set()).add(value)
        if cell.leg != "guarantee":
            found.setdefault(f"{cell.leg} seeds", set()).add(str(cell.seed))
        for name, value in _flat(cell.settings, cell.leg):
            if not name.endswith(" metric"):
                found.setdefault(name, set()).add(value)
    for record in result.records:
        for name, value in _flat(record.provenance.get("versions") or {}, "version"):
            found.setdefault(name, set()).add(value)
    return {name: ", ".join(sorted(values)) for name, values in sorted(found.items())}


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix} {visible(key)}"
        flat += _flat(value, name) if isinstance(value, Mapping) and value else [(name, plain(value))]
    return flat


def _differences(one: Mapping[str, str], two: Mapping[str, str]) -> tuple[Differs, ...]:
    """What is not equal: texts and model first, then settings, then versions."""
    order = ("data", "model", "leakage", "utility", "guarantee", "version")
    names = sorted({*one, *two}, key=lambda name: (order.index(name.split()[0]), name))
    return tuple((name, one.get(name, NONE), two.get(name, NONE)) for name in names if one.get(name) != two.get(name))


def _said_once(differs: Sequence[Differs]) -> tuple[Differs, ...]:
    """The same, with what differs alike in several legs named once, and a group that only one study has as one."""
    legs: dict[Differs, list[str]] = defaultdict(list)
    for name, one, two in differs:
        leg, _, rest = name.partition(" ")
        legs[(rest, one, two) if leg in LEGS else (name, one, two)].append(leg)
    named = [
        (name if len(found) > 1 or found[0] not in LEGS else f"{found[0]} {name}", one, two)
        for (name, one, two), found in legs.items()
    ]
    groups: dict[str, list[Differs]] = defaultdict(list)
    for name, one, two in named:
        group, _, setting = name.rpartition(" ")
        groups[group].append((setting, one, two))
    whole = {group: inside for group, inside in groups.items() if group not in LEGS and _one_study_s(inside)}
    told = [(group, _joined(inside, 1), _joined(inside, 2)) for group, inside in sorted(whole.items())]
    return (*(row for row in named if row[0].rpartition(" ")[0] not in whole), *told)


def _one_study_s(inside: Sequence[Differs]) -> bool:
    """Whether several settings of a group are all missing in one of the studies."""
    return len(inside) > 2 and any(all(row[side] == NONE for row in inside) for side in (1, 2))


def _joined(inside: Sequence[Differs], side: int) -> str:
    return ", ".join(f"{row[0]} {row[side]}" for row in inside if row[side] != NONE) or NONE
