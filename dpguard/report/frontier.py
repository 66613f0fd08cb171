"""Records to the frontier: for each policy what leaks, what it is worth, and what is guaranteed.

A policy's leakage is the largest mean over targets and seeds that any attack reached at any position. A
policy with a failed, skipped or missing cell keeps its row and says why; a leg is averaged only when it is
whole, so that no mean of survivors stands in for it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy.special import ndtri

from dpguard.confusion import UTILITY_METRICS, classes_of, from_confusion
from dpguard.errors import UserError, did_you_mean
from dpguard.policy.gaussian import success_bound
from dpguard.report.board import (
    COLUMNS,
    CONTROL,
    FLOOR,
    Answer,
    Frontier,
    Gap,
    Measure,
    Row,
    led_by,
    mark_front,
)
from dpguard.report.result import StudyResult
from dpguard.report.scores import Scores, position
from dpguard.report.utility import Judged, judge
from dpguard.study.record import Cell, Record

__all__ = ["COLUMNS", "CONTROL", "FLOOR", "Frontier", "Gap", "Measure", "Row", "frontier", "judged", "mark_front"]

Place = tuple[str, str, int]
"""Leg, position and seed of a cell."""


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
    scores = result.scores
    if scores.metrics and metric not in scores.metrics:
        hint = did_you_mean(metric, scores.metrics)
        raise UserError(f"no record has the leakage metric {metric!r}{hint}", loc=("leakage", "metric"))
    by_policy = defaultdict(list)
    for record in result.records:
        by_policy[record.cell.policy].append(record)
    planned: dict[str, set[Place]] = defaultdict(set)
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    for cell in result.planned:
        planned[cell.policy].add(_place(cell))
        tables[cell.policy] = cell.table
    everywhere = {_place(record.cell) for record in result.records}
    rows = [
        _row(policy, by_policy[policy], planned.get(policy, everywhere), result, utility_metric)
        if by_policy[policy]
        else _unrun(policy, planned.get(policy, everywhere), tables.get(policy, ()))
        for policy in result.policies
    ]
    rows = [led_by(row, metric) for row in rows]
    floors = [row.floor for row in sorted(rows, key=lambda row: row.policy != CONTROL) if row.floor]
    return Frontier(
        tuple(mark_front(rows)),
        metric,
        utility_metric,
        floors[0] if floors else None,
        *_majority(result.records, utility_metric),
        _parts(result.records),
    )


def _place(cell: Cell) -> Place:
    """What tells a policy's cells apart: two policies of one study have the same places."""
    return (cell.leg, position(cell) if cell.leg == "leakage" else "", cell.seed)


def _row(policy: str, records: list[Record], expected: set[Place], result: StudyResult, utility_metric: str) -> Row:
    gaps = _gaps(policy, records, expected)
    broken = {gap.leg for gap in gaps}
    table = records[0].cell.table
    done = [record for record in records if record.status == "done"]
    promised = next((record for record in done if record.cell.leg == "guarantee"), None)
    promise = promised.result if promised else {}
    shares = [r.result["shared_fraction"] for r in done if r.result.get("shared_fraction") is not None]
    row = Row(
        policy,
        epsilon=float(promise["epsilon"]) if promise else None,
        shared_fraction=float(shares[0]) if shares else None,
        table=tuple(table),
        rows=len(table),
        columns=_columns_set(table),
        attacks=tuple(dict.fromkeys(attack for attack, _ in result.scores.options(policy))),
        positions=tuple(dict.fromkeys(at for _, at in result.scores.options(policy))),
        seen=int(promise.get("seen", 1)),
        federation=next((f for r in records if (f := r.cell.settings.get("federation"))), {}),
        gaps=tuple(gaps),
    )
    if row.formal and promise.get("sigma_eff"):
        row = replace(row, sigma_eff=float(promise["sigma_eff"]))
    if "leakage" not in broken:
        among = _candidates(records)
        row = replace(row, candidates=among, measures=_measures(policy, promise, result.scores, among))
    if "utility" not in broken and "utility" in {leg for leg, _, _ in expected}:
        row = replace(row, utility=judged(done, utility_metric).interval())
    return row


def _unrun(policy: str, expected: set[Place], table: Sequence[Mapping[str, Any]]) -> Row:
    """A policy of which no cell has run: each of its cells is missing."""
    reason = "no cell of this policy has run"
    gaps = [Gap(policy, place[0], "missing", reason, _where(*place)) for place in sorted(expected)]
    told = tuple(gaps) or (Gap(policy, "every leg", "missing", reason),)
    return Row(policy, table=tuple(table), rows=len(table), columns=_columns_set(table), gaps=told)


def _columns_set(table: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(set(line) - {"layers"}) for line in table)


def _candidates(records: Sequence[Record]) -> int:
    """Among how many disclosed texts the true one was: 0 in the open world."""
    threats = [r.cell.settings.get("threat") or {} for r in records if r.cell.leg == "leakage"]
    return max((int(threat.get("candidates") or 0) for threat in threats), default=0)


def _measures(policy: str, promise: Mapping[str, Any], scores: Scores, among: int) -> dict[str, Measure]:
    """Every recorded metric of a policy, with the chance and the bound that its guarantee's record holds."""
    prior = next((option for option in scores.options(policy) if option[0] == FLOOR), None)
    found = {}
    for metric in scores.metrics:
        best, interval = scores.largest(policy, metric), scores.interval(policy, metric)
        if best is None or interval is None:
            continue
        attack, at = best[1]
        if among:
            chance, upper, bound = _closed(metric, promise, among)
        else:
            chance, upper, bound = _ceiling(metric, promise, scores.blocks[policy].texts)
        found[metric] = Measure(
            metric, interval, attack, at,
            positions=scores.by_position(policy, metric),
            answers=_answers(policy, metric, scores),
            floor=scores.interval(policy, metric, prior) if prior else None,
            chance=chance, upper=upper, bound=bound,
            # a lower limit is below the mean: only a mean above its bound can have one above it
            proven=scores.proven(policy, metric) if bound is not None and interval.value > bound else None,
        )  # fmt: skip
    return found


def _answers(policy: str, metric: str, scores: Scores) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    block = scores.blocks[policy]
    for option in scores.options(policy):
        mean, before = scores.mean(policy, option, metric), found.get(option[0])
        if mean is not None:
            taken, held = block.inherited[option], block.scores[option]
            found[option[0]] = Answer(
                max(mean, before.value if before else mean),
                taken + (before.taken_over if before else 0),
                held + (before.scores if before else 0),
            )
    return found


Ceiling = tuple[float | None, float | None, float | None]
"""Chance, its upper limit, and the bound that starts from there."""


def _closed(metric: str, promise: Mapping[str, Any], among: int) -> Ceiling:
    """In the closed world chance is known: 1/M to name the text whole. Nothing is known of partial scores."""
    if metric != "exact_match":
        return None, None, None
    pairs = [pair for pair in promise.get("bounds") or () if math.isclose(pair["kappa"], 1 / among)]
    return 1 / among, 1 / among, float(pairs[0]["success"]) if pairs else None


def _ceiling(metric: str, promise: Mapping[str, Any], texts: int) -> Ceiling:
    """Chance, its upper limit and the bound of a metric in the open world.

    Where a message holds several texts, each is matched with the best of as many guesses. That many guesses reach at
    most so many times the chance of one (a union bound), and the bound starts from there.
    """
    known = (promise.get("kappa") or {}).get(metric)
    if known is None:
        plain = promise.get("bound") if metric == "exact_match" else None  # records from before kappa was measured
        known = {"value": plain["kappa"], "upper": plain["kappa"], "bound": plain["success"]} if plain else None
    if known is None:
        return None, None, None
    chance, upper, bound = float(known["value"]), float(known["upper"]), known.get("bound")
    if texts == 1 or bound is None:
        return chance, upper, None if bound is None else float(bound)
    chance, upper = min(1.0, texts * chance), min(1.0, texts * upper)
    return chance, upper, success_bound(upper, _mu(promise)) if upper < 1 else 1.0


def _mu(promise: Mapping[str, Any]) -> float:
    """The mu of everything that the attacker saw, from the recorded bounds; infinite where they are certainty."""
    pairs = [(b["kappa"], b["success"]) for b in promise.get("bounds") or ()]
    pairs += [(k["upper"], k["bound"]) for k in (promise.get("kappa") or {}).values() if k.get("bound") is not None]
    inside = [(kappa, success) for kappa, success in pairs if 0 < kappa < 1 and success < 1 - 1e-9]
    return max((float(ndtri(success) - ndtri(kappa)) for kappa, success in inside), default=math.inf)


def judged(records: Sequence[Record], metric: str) -> Judged:
    """A utility metric over the seeds of one policy.

    Raises:
        ValueError: the seeds were judged on different test examples.
    """
    cells = sorted((r for r in records if r.cell.leg == "utility" and r.status == "done"), key=lambda r: r.cell.seed)
    labels = cells[0].result["labels"]
    if any(cell.result["labels"] != labels for cell in cells):
        raise ValueError(f"{cells[0].cell.policy}: its seeds were judged on different test examples")
    predictions = [cell.result["predictions"] for cell in cells]
    return judge(predictions, labels, metric, classes=cells[0].result.get("classes"))


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


def _majority(records: Sequence[Record], metric: str) -> tuple[float | None, bool]:
    """The accuracy or F1 of one answer to everything, and whether it is each client's own."""
    if metric not in ("accuracy", "f1"):
        return None, False
    done = [r.result for r in records if r.cell.leg == "utility" and r.status == "done" and r.result["labels"]]
    if not done:
        return None, False
    labels = done[0]["labels"]
    if metric == "f1":
        return _constant_f1(labels, done[0].get("classes") or classes_of(labels)), False
    one = Counter(labels).most_common(1)[0][1] / len(labels)
    own = max((float(result.get("federation", {}).get("commonest", 0.0)) for result in done), default=0.0)
    return max(one, own), own > one


def _constant_f1(labels: Sequence[int], of: int) -> float:
    """The best F1 of one answer to everything, in a task of so many classes."""
    count, classes = Counter(labels), range(of)
    tables = [[[count[true] * (guess == answer) for guess in classes] for true in classes] for answer in classes]
    return max(float(from_confusion(table, "f1")) for table in tables)


def _parts(records: Sequence[Record]) -> tuple[str, ...]:
    """The parts of the model in its order, from the resolved tables of the guarantees."""
    found = (r.result.get("table") or () for r in records if r.cell.leg == "guarantee" and r.status == "done")
    longest = max(found, key=lambda table: len({group["parameters"] for group in table}), default=())
    return tuple(dict.fromkeys(str(group["parameters"]) for group in longest))
