"""How the policies differ from one of them: leakage and utility on the same targets and test examples, in pairs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from dpguard.report.board import CONTROL, Frontier
from dpguard.report.frontier import judged
from dpguard.report.result import StudyResult
from dpguard.report.utility import Judged
from dpguard.stats import Interval
from dpguard.study.record import Record


@dataclass(frozen=True)
class Difference:
    """One policy less the reference.

    Attributes:
        number: its row in the frontier table, from 1.
        policy: its name.
        leakage: of the strongest attack on each; None where the two were not measured on the same messages.
        utility: on the same test examples; None where one of the two has none.
    """

    number: int
    policy: str
    leakage: Interval | None
    utility: Interval | None


@dataclass(frozen=True)
class Differences:
    """Every policy against one: positive leakage leaks more than the reference, positive utility is worth more."""

    reference: str
    rows: tuple[Difference, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        """Which of ``leakage`` and ``utility`` some row has a figure of."""
        return tuple(name for name in ("leakage", "utility") if any(getattr(row, name) for row in self.rows))


def differences(result: StudyResult, table: Frontier, reference: str) -> Differences:
    """Compute the differences of every other policy that was measured.

    The maximum over attacks is taken for each policy in every bootstrap sample, and the two are subtracted there: what
    makes some targets harder for all policies cancels.

    Args:
        result: the study and its records.
        table: its frontier.
        reference: the policy to compare with.
    """
    by_policy: dict[str, list[Record]] = defaultdict(list)
    for record in result.records:
        if record.status == "done":
            by_policy[record.cell.policy].append(record)
    whole = {row.policy: row for row in table.rows}
    base = whole[reference]
    worth = judged(by_policy[reference], table.utility_metric) if base.utility else None
    rows = []
    for number, row in enumerate(table.rows, 1):
        if row.policy == reference or not (row.leakage or row.utility):
            continue
        leakage = _leakage(result, table, row.policy, reference) if row.leakage and base.leakage else None
        utility = _utility(by_policy, table, row.policy, worth) if row.utility and worth else None
        rows.append(Difference(number, row.policy, leakage, utility))
    return Differences(reference, tuple(rows))


def _leakage(result: StudyResult, table: Frontier, policy: str, reference: str) -> Interval | None:
    one, two = (result.scores.largest(name, table.leakage_metric) for name in (policy, reference))
    return one[0].minus(two[0]) if one and two else None


def _utility(by_policy: dict[str, list[Record]], table: Frontier, policy: str, worth: Judged) -> Interval | None:
    return judged(by_policy[policy], table.utility_metric).minus(worth)


def compared(result: StudyResult, table: Frontier, recommended: str) -> list[Differences]:
    """Against the recommended policy where there is one, and against no defence."""
    names = dict.fromkeys(name for name in (recommended, CONTROL) if table.row(name))
    return [differences(result, table, name) for name in names]
