"""What was recovered of which text, as a difference between truth and recovery; only where texts may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.report.result import StudyResult
from dpguard.report.scores import position
from dpguard.report.text import Piece, at_name, diff, visible
from dpguard.study.record import Record

SHOWN = 8
"""Targets shown for each policy; the records hold the others."""


@dataclass(frozen=True)
class Evidence:
    """One target: what was recovered of its text, by the attack that recovered most.

    Attributes:
        target: index in the study's data.
        attack: the attack's name.
        at: the position in words.
        score: of the study's leakage metric.
        exact: recovered word for word.
        pieces: the difference between truth and recovery.
    """

    target: int
    attack: str
    at: str
    score: float
    exact: bool
    pieces: tuple[Piece, ...]


def evidence(attacked: Sequence[Record], result: StudyResult, metric: str) -> tuple[tuple[Evidence, ...], int]:
    """For every target the attack that recovered most of it; those that leaked most first.

    Args:
        attacked: finished leakage records of one policy.
        result: holds the texts, if they may be shown.
        metric: leakage metric that decides what "most" is.

    Returns:
        The `SHOWN` worst targets, and how many more there are.
    """
    best: dict[int, tuple[float, dict[str, Any], Record]] = {}
    texts: dict[tuple[str, int, str], str] = {}
    for record in attacked:
        cell = record.cell.id
        texts |= {(cell, row.target, row.attack): row.text for row in result.texts.get(cell, ())}
        for score in record.result["scores"]:
            target, value = int(score["target"]), score["metrics"].get(metric)
            known = (cell, target, "truth") in texts and (cell, target, str(score["attack"])) in texts
            if value is not None and known and (target not in best or value > best[target][0]):
                best[target] = (float(value), score, record)
    worst = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
    shown = tuple(
        Evidence(
            target,
            visible(score["attack"], limit=60),
            at_name(position(record.cell)),
            value,
            score["metrics"].get("exact_match") == 1,
            diff(texts[record.cell.id, target, "truth"], texts[record.cell.id, target, str(score["attack"])]),
        )
        for target, (value, score, record) in worst[:SHOWN]
    )
    return shown, max(len(worst) - SHOWN, 0)
