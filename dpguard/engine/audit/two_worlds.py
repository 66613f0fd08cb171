"""Check D, slow: an attacker who tells the batch with a canary from the one without does as well as claimed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpguard.engine.accounting import guarantee
from dpguard.engine.audit import batches
from dpguard.engine.audit.report import Row, judged, not_applicable
from dpguard.engine.audit.subject import Subject, sensitivity, shrunk
from dpguard.policy.table import Plan

DRAWS = 4_000
LARGEST = 16


def check(subject: Subject) -> list[Row]:
    """The row of check D: mu of the best test, which knows everything but the noise."""
    what = f"two worlds, {DRAWS:,} messages"
    claimed = guarantee(subject.plan, sampling_rate=1.0, steps=1, delta=1e-5)
    if not claimed.formal:
        return [not_applicable("D", what, "epsilon = inf, as claimed: nothing to tell apart in vain")]
    if claimed.sigma_eff == math.inf:
        return [not_applicable("D", what, "nothing is shared")]
    plan = shrunk(subject.plan, LARGEST)
    with_, without = worlds(plan, subject)
    send = subject.mechanism(plan)
    direction = _direction(plan, subject.batch_size)

    def score(batch: batches.PerExample, seed: int) -> float:
        noised = send(batch, seed).noised
        return sum(float((noised[name] * towards).sum()) for name, towards in direction.items())

    first = subject.seed + 10_000
    scores = [score(with_ if number % 2 else without, first + number) for number in range(DRAWS)]
    absent, present = torch.tensor(scores[0::2]).double(), torch.tensor(scores[1::2]).double()
    spread = math.sqrt((float(absent.var()) + float(present.var())) / 2)
    mu, claim = float(present.mean() - absent.mean()) / spread, 1 / claimed.sigma_eff
    # of the difference of two means of DRAWS / 2, and of the spread
    error = math.sqrt(4 / DRAWS + mu * mu / (2 * DRAWS))
    holds = mu <= claim + 5 * error
    return [judged("D", what, f"mu {mu:.3f} +- {error:.3f}", f"<= {claim:.3f}", holds)]


def worlds(plan: Plan, subject: Subject) -> tuple[batches.PerExample, batches.PerExample]:
    """A batch with a canary and one without: the canary's gradient is the clip, all in the least noisy tensor."""
    without = batches.make(plan, "normal", 2, subject.seed)
    canary = {name: torch.zeros_like(g[:1]) for name, g in without.items()}
    for name, towards in _direction(plan, subject.batch_size).items():
        canary[name][0] = 1e3 * towards.sign() * (plan[name].clip or 1.0)
    if any(group.unit == "update" for group in plan.groups.values()):
        return canary, batches.nothing(without)
    return batches.joined(without, canary), without


def _direction(plan: Plan, batch_size: int) -> dict[str, Tensor]:
    """Weights of the likelihood ratio test: C / s^2 along the canary, one shared tensor a group."""
    out = {}
    for group in plan.groups.values():
        seen = [rule for rule in group.rules if rule.sent]
        if not seen:
            continue
        rule = min(seen, key=lambda rule: rule.std(batch_size))
        unit = torch.ones(rule.slot.shape, dtype=torch.float64) / math.sqrt(rule.slot.size)
        out[rule.slot.name] = unit * sensitivity(group, batch_size) / rule.std(batch_size) ** 2
    return out
