"""Checks S and N on clips that follow a quantile: what an example does to the noised counts, and their noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpguard.engine import noise as noises
from dpguard.engine import wire
from dpguard.engine.audit import batches
from dpguard.engine.audit.noise import Draws, spread
from dpguard.engine.audit.report import Row, counted
from dpguard.engine.audit.sensitivity import TOLERANCE, Worst
from dpguard.engine.audit.subject import Subject, shrunk
from dpguard.policy.table import Plan

LARGEST = 64
ROUNDS = 16
SEEDS = 400
MOVES = 0.5
"""How far one example may move a count that `guarantee` charges for."""


def check(subject: Subject) -> list[Row]:
    """The rows about noised counts; none where every clip is fixed."""
    plan = shrunk(subject.plan, LARGEST)
    if not any(group.quantile is not None for group in plan.groups.values()):
        return []
    return [_moved(subject, plan), _noise(subject, plan)]


def counts(batch: batches.PerExample, plan: Plan, seed: int, batch_size: int) -> dict[str, float]:
    """Clip group -> the noised count behind its next bound, up to a constant, read back from that bound."""
    norms = wire.clip_and_sum(batch, plan).norms
    found = {}
    for key, bound in wire.next_clips(norms, plan, noises.source(seed), batch_size=batch_size).items():
        follows = plan.groups[key].quantile
        if follows is not None:
            found[key] = -math.log(bound / plan.groups[key].clip) * batch_size / follows.rate
    return found


def _moved(subject: Subject, plan: Plan) -> Row:
    worst = Worst()
    for number in range(ROUNDS):
        kind, rows = batches.KINDS[number % len(batches.KINDS)], 2 + number // len(batches.KINDS)
        seed = subject.seed + number
        batch = batches.make(plan, kind, rows, seed)
        here = counts(batch, plan, seed, subject.batch_size)
        for index in sorted({0, rows - 1}):
            there = counts(batches.without(batch, index), plan, seed, subject.batch_size)
            for key, value in here.items():
                worst.see(abs(value - there[key]), MOVES, f"{kind}, {key}")
    what = f"one example removed, {counted(len(here), 'noised count')}"
    return worst.row(what, "<= 1/2 (1 + 1e-6)", "x 1/2", TOLERANCE)


def _noise(subject: Subject, plan: Plan) -> Row:
    batch = batches.make(plan, "normal", 2, subject.seed)
    rows = [counts(batch, plan, subject.seed + number, subject.batch_size) for number in range(SEEDS)]
    pooled = []
    for key in rows[0]:
        follows = plan.groups[key].quantile
        if follows is None:
            continue
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        residuals: Tensor = (values - values.mean()) / follows.count_noise
        pooled.append((key, Draws(SEEDS - 1, float(residuals.square().sum()))))
    return spread("N", f"noise std of {counted(len(pooled), 'count')}", pooled)
