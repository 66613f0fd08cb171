"""Check S: one example moves no clip group's noised sum beyond its sensitivity. At one seed noise cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpguard.engine.audit import batches
from dpguard.engine.audit.report import Row, counted, judged, not_applicable
from dpguard.engine.audit.subject import Mechanism, Subject, sensitivity, shrunk
from dpguard.policy.table import Group, Plan

BATCHES = 48
LARGEST = 256
"""Coordinates a tensor: sensitivity does not depend on the size of a tensor."""
TOLERANCE = 1e-6
ROUNDS = 3


@dataclass
class Worst:
    """The largest ratio of a distance to its bound so far, and where it was."""

    ratio: float = 0.0
    where: str = ""

    def see(self, distance: float, bound: float, where: str) -> None:
        """Take one distance into account; one that is not a number is beyond every bound."""
        ratio = distance / bound if math.isfinite(distance) else math.inf
        if ratio > self.ratio or not self.where:
            self.ratio, self.where = ratio, where

    def row(self, what: str, claim: str, of: str, tolerance: float) -> Row:
        """The verdict."""
        figure = f"{self.ratio:.7g} {of} at most ({self.where})"
        return judged("S", what, figure, claim, self.ratio <= 1 + tolerance)


def check(subject: Subject) -> list[Row]:
    """The rows of check S."""
    plan = shrunk(subject.plan, LARGEST)
    again = _reproducible(subject, plan)
    if not plan.groups:
        reason = "nothing is trained" if not plan.trained else "the policy clips nothing"
        return [again, not_applicable("S", "one example removed", reason)]
    return [again, *_removal(subject, plan), *_rounds(subject, plan)]


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], group: Group) -> float:
    """L2 distance of a group's tensors."""
    return math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in group.names))


def neighbour(index: int, group: Group) -> str:
    """Key of the world to compare with: without the example, or without the whole update."""
    return "empty" if group.unit == "update" else f"without {index}"


def _reproducible(subject: Subject, plan: Plan) -> Row:
    send = subject.mechanism(plan)
    batch = batches.make(plan, "normal", 3, subject.seed)
    first, second = send(batch, subject.seed), send(batch, subject.seed)
    same = all(first.noised[n].equal(second.noised[n]) for n in plan.trained)
    found = "the same tensors" if same else "other tensors the second time"
    return judged("S", "one batch and seed, twice", found, "the same tensors", same)


def _removal(subject: Subject, plan: Plan) -> list[Row]:
    send, worst, joint = subject.mechanism(plan), Worst(), Worst()
    groups = plan.groups
    bounds = {key: sensitivity(group, subject.batch_size) for key, group in groups.items()}
    one_unit = len({group.unit for group in groups.values()}) == 1
    weights = _weights(plan, bounds, subject.batch_size)
    together = math.sqrt(sum((weights[key] * bounds[key]) ** 2 for key in groups))
    for number in range(BATCHES):
        kind, rows = batches.KINDS[number % len(batches.KINDS)], 1 + number // len(batches.KINDS)
        seed = subject.seed + number
        batch = batches.make(plan, kind, rows, seed)
        here = send(batch, seed).noised
        for index in sorted({0, rows - 1}):
            there = _neighbours(send, batch, index, groups, seed)
            moved = {key: distance(here, there[neighbour(index, g)], g) for key, g in groups.items()}
            for key, found in moved.items():
                worst.see(found, bounds[key], f"{kind}, {key}")
            if one_unit:
                joint.see(math.sqrt(sum((weights[k] * d) ** 2 for k, d in moved.items())), together, kind)
    unit = "the whole update removed" if "update" in {g.unit for g in groups.values()} else "one example removed"
    out = [worst.row(f"{unit}, {counted(len(groups), 'group')} apart", "<= C (1 + 1e-6)", "C", TOLERANCE)]
    if one_unit:
        out.append(joint.row(f"{unit}, all groups at once", "<= sqrt(sum (C/s)^2)", "of it", TOLERANCE))
    return out


def _weights(plan: Plan, bounds: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """1 / least noise std of every group; 1 / bound where some group has no noise (nothing to whiten by)."""
    least = {key: min(rule.std(batch_size) for rule in group.rules) for key, group in plan.groups.items()}
    noisy = all(least.values())
    return {key: 1 / (least[key] if noisy else bounds[key]) for key in least}


def _neighbours(
    send: Mechanism, batch: Mapping[str, Tensor], index: int, groups: Mapping[str, Group], seed: int
) -> dict[str, dict[str, Tensor]]:
    out = {}
    units = {group.unit for group in groups.values()}
    if "update" in units:
        out["empty"] = send(batches.nothing(batch), seed).noised
    if units - {"update"}:
        out[f"without {index}"] = send(batches.without(batch, index), seed).noised
    return out


def _rounds(subject: Subject, plan: Plan) -> list[Row]:
    """Three rounds of one mechanism: what it remembers may not carry one round's example into the next."""
    groups = plan.groups
    content = [batches.make(plan, "aligned", 3, subject.seed + r) for r in range(ROUNDS)]
    fewer = [batches.without(batch, 0) for batch in content]
    empty = [batches.nothing(batch) for batch in content]
    seeds = [subject.seed + r for r in range(ROUNDS)]

    def run(rounds: list[batches.PerExample]) -> list[dict[str, Tensor]]:
        send = subject.mechanism(plan)
        return [send(batch, seed).noised for batch, seed in zip(rounds, seeds, strict=True)]

    world, never = run(content), {"example": run(fewer), "update": run(empty)}
    worst, memory = Worst(), 0.0
    for key, group in groups.items():
        for r in range(ROUNDS):
            moved = distance(world[r], never[group.unit][r], group)
            worst.see(moved, sensitivity(group, subject.batch_size), f"round {r + 1}, {key}")
    for first in (fewer, empty):
        once = run([first[0], *content[1:]])
        for group in groups.values():
            moved = max(distance(world[r], once[r], group) for r in range(1, ROUNDS))
            memory = max(memory, (moved if math.isfinite(moved) else math.inf) / sensitivity(group, subject.batch_size))
    return [
        worst.row(f"{ROUNDS} rounds, one example never there", "<= C (1 + 1e-6)", "C", TOLERANCE),
        judged(
            "S", f"{ROUNDS} rounds, example only in the first", f"later rounds moved {memory:.3g} C", "0", memory == 0.0
        ),
    ]
