"""Records to the frontier: for each policy what leaks, what it is worth, and what is guaranteed.

A policy's leakage is the largest mean over targets and seeds that any attack reached at any position. A
policy with a failed, skipped or missing cell keeps its row and says why; a leg is averaged only when it is
whole, so that no mean of survivors stands in for it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from dpguard.errors import UserError, did_you_mean
from dpguard.report.result import StudyResult
from dpguard.report.scores import Scores, position
from dpguard.report.text import csv_cell
from dpguard.stats import UTILITY_METRICS, Interval, mean_interval, utility_interval
from dpguard.study.record import Cell, Record

CONTROL = "none"
FLOOR = "prior"
COLUMNS = [
    "policy",
    "leakage",
    "leakage_low",
    "leakage_high",
    "leakage_metric",
    "attack",
    "utility",
    "utility_low",
    "utility_high",
    "epsilon",
    "shared_fraction",
    "on_front",
]

Place = tuple[str, str, int]
"""Leg, position and seed of a cell."""


@dataclass(frozen=True)
class Gap:
    """A cell that gave no result: ``status`` is failed, skipped or missing; ``where`` names seed and position."""

    policy: str
    leg: str
    status: str
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Row:
    """One policy on the frontier; None where a leg is not whole.

    Attributes:
        policy: its name in the study.
        leakage: largest mean of the leakage metric over attacks and positions, in [0, 1].
        attack: the attack that reached it.
        at: the position at which it did.
        exact: the same for exact match, which is what ``bound`` speaks of.
        utility: the study's utility metric on held-out texts.
        epsilon: of the training; infinite when there is no formal guarantee.
        proven: lower limit of exact match at the level `ALARM`, shared among all policies, attacks and positions.
        bound: largest possible chance that one message gives one record away, when the guarantee has one.
        kappa: the chance of a guess without the message that ``bound`` supposes.
        shared_fraction: share of the parameters that leaves the client.
        rows: length of the policy's table.
        attacks: the attacks that ran, the prior among them.
        gaps: what is missing, and why.
        on_front: no other policy leaks no more and is worth no less, with one of the two strict.
    """

    policy: str
    leakage: Interval | None = None
    attack: str = ""
    at: str = ""
    exact: Interval | None = None
    utility: Interval | None = None
    epsilon: float | None = None
    proven: float | None = None
    bound: float | None = None
    kappa: float | None = None
    shared_fraction: float | None = None
    rows: int = 0
    attacks: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    on_front: bool = False

    @property
    def formal(self) -> bool:
        """Whether epsilon is known and finite."""
        return self.epsilon is not None and math.isfinite(self.epsilon)

    @property
    def broken(self) -> bool:
        """More came back whole than the guarantee allows, beyond chance: a bug somewhere."""
        return self.proven is not None and self.bound is not None and self.proven > self.bound


@dataclass(frozen=True)
class Frontier:
    """All policies of a study, in the study's order.

    Attributes:
        rows: one for every policy.
        leakage_metric: what ``leakage`` measures.
        utility_metric: what ``utility`` measures.
        floor: the leakage metric of the prior attack, which sees no message; None when it did not run.
        majority: accuracy of always answering the commonest class; None unless utility is accuracy.
    """

    rows: tuple[Row, ...]
    leakage_metric: str
    utility_metric: str
    floor: Interval | None = None
    majority: float | None = None

    def row(self, policy: str) -> Row | None:
        """The row of a policy, or None."""
        return next((row for row in self.rows if row.policy == policy), None)

    @property
    def ceiling(self) -> Row | None:
        """The undefended control."""
        return self.row(CONTROL)

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Every cell without a result."""
        return tuple(gap for row in self.rows for gap in row.gaps)

    def to_frame(self) -> pd.DataFrame:
        """The columns of frontier.csv, typed; NaN where nothing was measured, and infinite epsilons."""
        return pd.DataFrame([_columns(row, self.leakage_metric) for row in self.rows], columns=COLUMNS)

    def to_csv(self) -> str:
        """The text of frontier.csv: infinity is ``inf``, a missing number is empty, formulas are disarmed."""
        frame = self.to_frame()
        for name in ("policy", "leakage_metric", "attack"):
            frame[name] = [csv_cell(text) for text in frame[name]]
        return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def _columns(row: Row, metric: str) -> dict[str, Any]:
    leakage, utility = row.leakage, row.utility
    return {
        "policy": row.policy,
        "leakage": leakage.value if leakage else math.nan,
        "leakage_low": leakage.low if leakage else math.nan,
        "leakage_high": leakage.high if leakage else math.nan,
        "leakage_metric": metric,
        "attack": row.attack,
        "utility": utility.value if utility else math.nan,
        "utility_low": utility.low if utility else math.nan,
        "utility_high": utility.high if utility else math.nan,
        "epsilon": math.nan if row.epsilon is None else row.epsilon,
        "shared_fraction": math.nan if row.shared_fraction is None else row.shared_fraction,
        "on_front": row.on_front,
    }


def frontier(result: StudyResult, *, metric: str | None = None, utility_metric: str | None = None) -> Frontier:
    """Compute every policy's row, the floor and the front.

    Args:
        result: the study and its records.
        metric: leakage metric instead of the study's.
        utility_metric: accuracy, f1 or mcc instead of the study's.

    Raises:
        UserError: a metric that no record has.
    """
    spec = result.spec
    metric = metric or str((spec.get("leakage") or {}).get("metric") or "rougeL")
    utility_metric = utility_metric or str((spec.get("utility") or {}).get("metric") or "accuracy")
    if utility_metric not in UTILITY_METRICS:
        hint = did_you_mean(utility_metric, UTILITY_METRICS)
        raise UserError(f"the utility metric is {utility_metric!r}{hint}", loc=("utility", "metric"))
    scores = Scores(result.records)
    if scores.metrics and metric not in scores.metrics:
        hint = did_you_mean(metric, scores.metrics)
        raise UserError(f"no record has the leakage metric {metric!r}{hint}", loc=("leakage", "metric"))
    by_policy = defaultdict(list)
    for record in result.records:
        by_policy[record.cell.policy].append(record)
    planned: dict[str, set[Place]] = defaultdict(set)
    for cell in result.planned:
        planned[cell.policy].add(_place(cell))
    everywhere = {_place(record.cell) for record in result.records}
    rows = [
        _row(policy, by_policy[policy], planned.get(policy, everywhere), scores, metric, utility_metric)
        for policy in result.policies
    ]
    return Frontier(
        tuple(mark_front(rows)),
        metric,
        utility_metric,
        _floor(rows, scores, metric),
        _majority(result.records) if utility_metric == "accuracy" else None,
    )


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``on_front`` set: the Pareto front of low leakage and high utility, by the point estimates."""
    known = [(row.leakage.value, row.utility.value) for row in rows if row.leakage and row.utility]

    def on_front(row: Row) -> bool:
        if row.leakage is None or row.utility is None:
            return False
        x, y = row.leakage.value, row.utility.value
        return not any(a <= x and b >= y and (a < x or b > y) for a, b in known)

    return [replace(row, on_front=on_front(row)) for row in rows]


def _place(cell: Cell) -> Place:
    """What tells a policy's cells apart: two policies of one study have the same places."""
    return (cell.leg, position(cell) if cell.leg == "leakage" else "", cell.seed)


def _row(
    policy: str,
    records: list[Record],
    expected: set[Place],
    scores: Scores,
    metric: str,
    utility_metric: str,
) -> Row:
    if not records:
        return Row(policy, gaps=(Gap(policy, "every leg", "missing", "no cell of this policy has run"),))
    gaps = _gaps(policy, records, expected)
    broken = {gap.leg for gap in gaps}
    row = Row(policy, rows=len(records[0].cell.table), gaps=tuple(gaps))
    for record in records:
        share = record.result.get("shared_fraction")
        if row.shared_fraction is None and share is not None:
            row = replace(row, shared_fraction=float(share))
        if record.cell.leg == "guarantee" and record.status == "done":
            bound = record.result.get("bound") or {"success": None, "kappa": None}
            row = replace(row, epsilon=float(record.result["epsilon"]), bound=bound["success"], kappa=bound["kappa"])
    row = replace(row, attacks=tuple(dict.fromkeys(attack for attack, _ in scores.options(policy))))
    if "leakage" not in broken and (found := scores.largest(policy, metric)):
        exact = scores.largest(policy, "exact_match")
        leakage, (attack, at) = found
        row = replace(row, leakage=leakage, attack=attack, at=at, exact=exact[0] if exact else None)
        row = replace(row, proven=scores.proven(policy))
    if "utility" not in broken and "utility" in {leg for leg, _, _ in expected}:
        row = replace(row, utility=utility_of(records, utility_metric))
    return row


def utility_of(records: Sequence[Record], metric: str) -> Interval:
    """A utility metric over the seeds of one policy.

    Raises:
        ValueError: the seeds were judged on different test examples.
    """
    cells = sorted((r for r in records if r.cell.leg == "utility" and r.status == "done"), key=lambda r: r.cell.seed)
    labels = cells[0].result["labels"]
    if any(cell.result["labels"] != labels for cell in cells):
        raise ValueError(f"{cells[0].cell.policy}: its seeds were judged on different test examples")
    return utility_interval([cell.result["predictions"] for cell in cells], labels, metric)


def _gaps(policy: str, records: list[Record], expected: set[Place]) -> list[Gap]:
    gaps = []
    for record in sorted(records, key=lambda record: _place(record.cell)):
        if record.status != "done":
            reason = record.reason or "no reason was recorded"
            gaps.append(Gap(policy, record.cell.leg, record.status, reason, _where(*_place(record.cell))))
    for place in sorted(expected - {_place(record.cell) for record in records}):
        gaps.append(Gap(policy, place[0], "missing", "this cell has not run", _where(*place)))
    return gaps


def _where(leg: str, at: str, seed: int) -> str:
    if leg == "guarantee":
        return ""
    return f"{at}, seed {seed}" if at else f"seed {seed}"


def _floor(rows: Sequence[Row], scores: Scores, metric: str) -> Interval | None:
    """The prior sees no message, so its scores under the control speak for every policy."""
    for row in sorted(rows, key=lambda row: row.policy != CONTROL):
        for option in scores.options(row.policy):
            values = scores.array(row.policy, option, metric)
            if option[0] == FLOOR and np.isfinite(values).any():
                return mean_interval(values)
    return None


def _majority(records: Sequence[Record]) -> float | None:
    for record in records:
        if record.cell.leg == "utility" and record.status == "done" and record.result["labels"]:
            labels = record.result["labels"]
            return Counter(labels).most_common(1)[0][1] / len(labels)
    return None
