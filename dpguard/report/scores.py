"""Scores of all leakage cells as arrays: the same targets and seeds on the same axes for every policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dpguard.stats import Drawn, Floats, Interval, binomial, largest, lower_limit
from dpguard.study.record import Cell, Record

ALARM = 1e-3
"""Chance that any mean score of a study is called above its bound when none is."""

Option = tuple[str, str]
"""An attack and the position in the training that it attacked."""

Unit = int | tuple[int, ...]
"""What is resampled: a target, or the targets of a message that holds several."""


@dataclass
class Block:
    """Every score of one policy.

    Attributes:
        options: (attack, position), in the order in which they ran.
        units: what is resampled: a target, or the targets of a message that holds several.
        sums: sums of scores, shape (metrics, options, units, seeds).
        counts: how many scores each sum is made of.
        certain, inherited, scores: by option: reconstructions that were certain, that were taken over from a cheaper
            attack, and all.
    """

    options: list[Option]
    units: tuple[Unit, ...]
    sums: Floats
    counts: Floats
    certain: dict[Option, int] = field(default_factory=dict)
    inherited: dict[Option, int] = field(default_factory=dict)
    scores: dict[Option, int] = field(default_factory=dict)

    @cached_property
    def texts(self) -> int:
        """How many texts a message holds."""
        return max((len(_targets(unit)) for unit in self.units), default=1)


class Scores:
    """Scores of all leakage cells, laid out so that policies and attacks can be compared target by target.

    Texts of one message are dependent (one message, one run of the attack), so where a message holds several, the
    message is what is resampled.

    Attributes:
        metrics: names of the metrics that occur.
        seeds: every seed of the leakage leg, in order.
        blocks: policy -> its scores.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        done = [r for r in records if r.cell.leg == "leakage" and r.status == "done"]
        done.sort(key=lambda record: (position(record.cell) != "start", position(record.cell), record.cell.seed))
        self.metrics = sorted(
            {name for record in done for score in record.result["scores"] for name in score["metrics"]}
        )
        self.seeds = sorted({record.cell.seed for record in done})
        by_policy: dict[str, list[Record]] = {}
        for record in done:
            by_policy.setdefault(record.cell.policy, []).append(record)
        self.blocks = {policy: self._block(found) for policy, found in by_policy.items()}
        self._largest: dict[tuple[str, str], tuple[Drawn, Option] | None] = {}
        self._same: dict[tuple[Any, ...], tuple[Drawn, int]] = {}
        self._interval: dict[tuple[str, Option, str], Interval | None] = {}

    def _block(self, records: Sequence[Record]) -> Block:
        runs = [(record, attack, found) for record in records for attack, found in _by_attack(record).items()]
        options = list(dict.fromkeys((attack, position(record.cell)) for record, attack, _ in runs))
        messages = {record.cell.id: _messages(record) for record in records}
        units = sorted(
            {unit for found in messages.values() for unit in found}, key=lambda u: u if isinstance(u, tuple) else (u,)
        )
        place = {unit: number for number, unit in enumerate(units)}
        shape = (len(self.metrics), len(options), len(units), max(len(self.seeds), 1))
        block = Block(options, tuple(units), np.zeros(shape), np.zeros(shape))
        for record, attack, found in runs:
            option, seed = (attack, position(record.cell)), self.seeds.index(record.cell.seed)
            values = np.array([[s["metrics"].get(m) for m in self.metrics] for s in found], dtype=np.float64)
            rows = [place[unit] for unit in _units_of(found, messages[record.cell.id])]
            known, at = np.isfinite(values), options.index(option)
            sums, counts = block.sums[:, at, :, seed].T, block.counts[:, at, :, seed].T
            np.add.at(sums, rows, np.where(known, values, 0.0))
            np.add.at(counts, rows, known.astype(np.float64))
            for tally, name in ((block.certain, "certain"), (block.inherited, "inherited")):
                tally[option] = tally.get(option, 0) + sum(bool(score.get(name)) for score in found)
            block.scores[option] = block.scores.get(option, 0) + len(found)
        return block

    def options(self, policy: str) -> list[Option]:
        """Every (attack, position) that has scores for the policy, in the order in which they ran."""
        return self.blocks[policy].options if policy in self.blocks else []

    def largest(self, policy: str, metric: str) -> tuple[Drawn, Option] | None:
        """The largest mean over attacks and positions, with the attack and position that reached it."""
        key = (policy, metric)
        if key not in self._largest:
            self._largest[key] = self._find(policy, metric, self.options(policy))
        return self._largest[key]

    def interval(self, policy: str, metric: str, option: Option | None = None) -> Interval | None:
        """The interval of one attack at one position; without an option, of the largest mean over all."""
        if option is None:
            found = self.largest(policy, metric)
            return self._chosen(policy, metric, found) if found else None
        key = (policy, option, metric)
        if key not in self._interval:
            self._interval[key] = self._proportion(policy, metric, option)
            if self._interval[key] is None and (one := self._find(policy, metric, [option])):
                self._interval[key] = self._sized(policy, one[0].interval())
        return self._interval[key]

    def mean(self, policy: str, option: Option, metric: str) -> float | None:
        """Mean over all scores of one attack at one position."""
        sums, counts = self._of(policy, metric, [option])
        return float(sums.sum() / counts.sum()) if counts.sum() else None

    def by_position(self, policy: str, metric: str) -> dict[str, float]:
        """Position -> largest mean over attacks there, in the order in which the positions were attacked."""
        found: dict[str, float] = {}
        for option in self.options(policy):
            mean = self.mean(policy, option, metric)
            if mean is not None:
                found[option[1]] = max(mean, found.get(option[1], 0.0))
        return found

    def proven(self, policy: str, metric: str) -> float | None:
        """Largest lower limit of a metric's mean over attacks and positions, corrected for looking at all.

        The level `ALARM` is shared (Bonferroni) among all policies, attacks, positions and metrics. Units are the
        trials: what a target or message gave away is its mean over seeds. Exact for zeros and ones (Clopper and
        Pearson), else by `lower_limit`.
        """
        looks = sum(len(block.options) for block in self.blocks.values()) * max(len(self.metrics), 1)
        limits = []
        for option in self.options(policy):
            sums, counts = self._of(policy, metric, [option])
            total, held = sums[0].sum(axis=1), counts[0].sum(axis=1)
            means = total[held > 0] / held[held > 0]
            if means.size and set(means.tolist()) <= {0.0, 1.0}:
                limits.append(binomial(round(means.sum()), means.size, confidence=1 - 2 * ALARM / looks).low)
            elif means.size:
                limits.append(lower_limit(float(means.mean()), means.size, ALARM / looks))
        return max(limits, default=None)

    def _of(self, policy: str, metric: str, options: Sequence[Option]) -> tuple[Floats, Floats]:
        """Sums and counts of a metric, each of shape (options, units, seeds)."""
        if policy not in self.blocks or metric not in self.metrics:
            return np.zeros((1, 1, 1)), np.zeros((1, 1, 1))
        block, at = self.blocks[policy], self.metrics.index(metric)
        chosen = [block.options.index(option) for option in options]
        return block.sums[at, chosen], block.counts[at, chosen]

    def _find(self, policy: str, metric: str, options: Sequence[Option]) -> tuple[Drawn, Option] | None:
        sums, counts = self._of(policy, metric, options)
        if not options or not counts.any():
            return None
        # attacks that saw no message, and policies that changed nothing, have the same scores: they are drawn once
        units = self.blocks[policy].units
        key = (units, sums.tobytes(), counts.tobytes())
        if key not in self._same:
            self._same[key] = largest(sums, counts, units=units)
        drawn, best = self._same[key]
        return drawn, options[best]

    def _chosen(self, policy: str, metric: str, found: tuple[Drawn, Option]) -> Interval:
        """The interval of the largest; where that is a proportion, no narrower than the exact one."""
        drawn, option = found
        interval, exact = drawn.interval(), self._proportion(policy, metric, option)
        if exact:
            interval = replace(interval, low=min(interval.low, exact.low), high=max(interval.high, exact.high))
        return self._sized(policy, interval)

    def _proportion(self, policy: str, metric: str, option: Option) -> Interval | None:
        """The exact interval of zeros and ones, one score a unit; None for anything else."""
        sums, counts = self._of(policy, metric, [option])
        held = counts > 0
        one_each = counts.max() == 1 and bool((held.sum(axis=2) <= 1).all())
        if not one_each or not held.any() or not bool(((sums == 0) | (sums == 1)).all()):
            return None
        interval = binomial(int(sums.sum()), int(held.sum()))
        return replace(interval, seeds=int(held.any(axis=(0, 1)).sum()))

    def _sized(self, policy: str, interval: Interval) -> Interval:
        held = interval.n * self.blocks[policy].texts
        return replace(interval, texts=held if held > interval.n else 0)


def _by_attack(record: Record) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for score in record.result["scores"]:
        found.setdefault(str(score["attack"]), []).append(score)
    return found


def _messages(record: Record) -> list[Unit]:
    """The unit of every text in the order of the scores: its target, or the targets of its message.

    Scores stand in the order of the messages, and an attack that ran on all of them names all their targets.
    """
    whole = max(_by_attack(record).values(), key=len, default=[])
    targets = [int(score["target"]) for score in whole]
    messages = int(record.result.get("messages") or len(targets))
    size = len(targets) // messages if messages and len(targets) % messages == 0 else 1
    if size <= 1:
        return list(targets)
    return [tuple(targets[at - at % size : at - at % size + size]) for at in range(len(targets))]


def _units_of(found: Sequence[Mapping[str, Any]], units: Sequence[Unit]) -> list[Unit]:
    """The unit of each of an attack's scores, also where it ran on some of the messages only."""
    if len(found) == len(units):
        return list(units)
    by_target: dict[int, Unit] = {}
    for unit in units:
        for target in _targets(unit):
            by_target.setdefault(target, unit)
    return [by_target[int(score["target"])] for score in found]


def _targets(unit: Unit) -> tuple[int, ...]:
    return unit if isinstance(unit, tuple) else (unit,)


def position(cell: Cell) -> str:
    """Where in the training a leakage cell attacks: "start" or "end"."""
    return str(cell.settings.get("at", "start"))
