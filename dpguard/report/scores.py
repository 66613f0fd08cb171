"""Scores of all leakage cells as arrays: the same targets and seeds on the same axes for every policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpguard.stats import Floats, Interval, binomial, max_interval
from dpguard.study.record import Cell, Record

ALARM = 1e-3
"""Chance that any exact-match rate of a study is called above its bound when none is."""


class Scores:
    """Scores of all leakage cells, laid out so that policies and attacks can be compared target by target.

    Attributes:
        metrics: names of the metrics that occur.
        targets: every target of the study, in order: the same axis for all, which pairs all comparisons.
        seeds: every seed of the leakage leg, in order.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        done = [r for r in records if r.cell.leg == "leakage" and r.status == "done"]
        done.sort(key=lambda record: (position(record.cell) != "start", position(record.cell), record.cell.seed))
        self._scores: dict[str, dict[tuple[str, str], list[tuple[int, dict[str, Any]]]]] = {}
        for record in done:
            by_option = self._scores.setdefault(record.cell.policy, {})
            for score in record.result["scores"]:
                option = (str(score["attack"]), position(record.cell))
                by_option.setdefault(option, []).append((record.cell.seed, score))
        found = [score for options in self._scores.values() for kept in options.values() for _, score in kept]
        self.metrics = sorted({name for score in found for name in score["metrics"]})
        self.targets = sorted({int(score["target"]) for score in found})
        self.seeds = sorted({record.cell.seed for record in done})
        self._column = {target: number for number, target in enumerate(self.targets)}

    def options(self, policy: str) -> list[tuple[str, str]]:
        """Every (attack, position) that has scores for the policy, in the order in which they ran."""
        return list(self._scores.get(policy, {}))

    def of(self, policy: str, option: tuple[str, str]) -> list[tuple[int, dict[str, Any]]]:
        """(seed, score) of every target under one attack at one position."""
        return self._scores.get(policy, {}).get(option, [])

    def array(self, policy: str, option: tuple[str, str], metric: str) -> Floats:
        """Scores of one attack at one position: shape (targets, seeds), NaN where there is none."""
        values = np.full((len(self.targets), max(len(self.seeds), 1)), np.nan)
        for seed, score in self.of(policy, option):
            value = score["metrics"].get(metric)
            if value is not None:
                values[self._column[int(score["target"])], self.seeds.index(seed)] = float(value)
        return values

    def largest(self, policy: str, metric: str) -> tuple[Interval, tuple[str, str]] | None:
        """The largest mean over attacks and positions, with the attack and position that reached it."""
        options = self.options(policy)
        values = np.array([self.array(policy, option, metric) for option in options])
        if not options or not np.isfinite(values).any():
            return None
        interval, best = max_interval(values)
        return interval, options[best]

    def proven(self, policy: str) -> float | None:
        """Largest exact lower limit of exact match over attacks and positions, corrected for looking at all.

        The level `ALARM` is shared (Bonferroni) among all policies, attacks and positions. Targets are the
        trials: what a target gave away is its mean over seeds.
        """
        looks = sum(len(options) for options in self._scores.values())
        limits = []
        for option in self.options(policy):
            values = self.array(policy, option, "exact_match")
            known = np.isfinite(values)
            n = int(known.any(axis=1).sum())
            if n:
                whole = math.floor(float(values[known].mean()) * n + 1e-9)
                limits.append(binomial(whole, n, confidence=1 - 2 * ALARM / looks).low)
        return max(limits, default=None)


def position(cell: Cell) -> str:
    """Where in the training a leakage cell attacks: "start" or "end"."""
    return str(cell.settings.get("at", "start"))
