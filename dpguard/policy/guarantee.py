"""What a plan may claim: one number a step, its composition, and the statement in words. No torch here.

All shared clip groups noised from one Poisson batch are ONE Gaussian query after whitening, with
mu = sqrt(sum of (C_l / s_l)^2) (McMahan et al. 2018, arXiv 1812.06210; Dong, Roth and Su, arXiv 1905.02383,
Cor. 3.3); inside a group with differing noise the smallest counts. The noised counts of adaptive clips are
further coordinates of the same query (Andrew et al., arXiv 1905.03871, Thm 1). Where the client's whole update
is clipped, one client is protected instead of one example. A claim that cannot be made is epsilon = infinity
with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dpguard.errors import UserError, did_you_mean
from dpguard.policy import gaussian
from dpguard.policy.reasons import why_infinite
from dpguard.policy.statement import View, compose
from dpguard.policy.table import Group, Plan

Sampling = Literal["poisson", "shuffle"]
Unit = Literal["example", "client"]


class Accountant(Protocol):
    """Composition of a subsampled Gaussian; `engine.accounting` has the real one (PRV, RDP)."""

    def epsilon(self, *, sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
        """Upper bound on epsilon after ``steps`` Poisson-sampled steps at noise multiplier ``sigma``."""
        ...

    def delta(self, *, sigma: float, sampling_rate: float, steps: int, epsilon: float) -> float:
        """Upper bound on delta at this epsilon."""
        ...

    def compose(self, *, history: Sequence[tuple[float, float, int]], delta: float) -> float:
        """Upper bound on the joint epsilon of parts (sigma, sampling rate, steps), sampled independently."""
        ...


@dataclass(frozen=True)
class Guarantee:
    """What may be claimed about one example of one client, or about one client.

    Attributes:
        epsilon: at ``delta``; infinity when no claim can be made, 0 when nothing leaves.
        delta: as asked.
        sigma_eff: effective noise multiplier of one step, 1 / mu; 0 when there is no claim.
        sampling_rate: Poisson inclusion probability per step; 1 when a client is the unit.
        steps: number of released messages.
        reasons: why epsilon is infinite; empty when it is not.
        statement: everything in words: unit, adjacency, sampling, view, covered, not covered.
        sampling: ``poisson`` or ``shuffle``.
        unit: ``example`` or ``client``: whose replacement by zero the epsilon is about.
    """

    epsilon: float
    delta: float
    sigma_eff: float
    sampling_rate: float
    steps: int
    reasons: tuple[str, ...]
    statement: str
    sampling: Sampling
    accountant: Accountant
    unit: Unit = "example"

    @property
    def formal(self) -> bool:
        """True when epsilon is finite."""
        return math.isfinite(self.epsilon)

    def bound(self, kappa: float, messages: int = 1) -> float | None:
        """B1: best chance of any attack that saw ``messages`` messages holding the example (q = 1).

        Args:
            kappa: the best chance without the messages: 1/M among M candidates, else measured.
            messages: how many messages of the example the attacker saw, at most the guarantee's steps.

        Returns:
            A probability, or None when epsilon is infinite (no bound).

        Raises:
            UserError: kappa is no probability, or more messages than the guarantee covers.
        """
        if not 0 < kappa < 1:
            raise UserError(f"kappa is {kappa!r}; expected a probability above 0 and below 1")
        if isinstance(messages, bool) or messages not in range(1, self.steps + 1):
            raise UserError(
                f"messages is {messages!r}; expected a whole number from 1 to the {self.steps} covered here"
            )
        if self.reasons:
            return None
        if self.sigma_eff in (0, math.inf):
            return 1.0 if self.sigma_eff == 0 else kappa
        return gaussian.success_bound(kappa, math.sqrt(messages) / self.sigma_eff)

    def bound_amplified(self, kappa: float) -> float | None:
        """B2: bound for an attacker who does not know in which steps the example took part.

        The minimum over epsilon of e^epsilon kappa + delta(epsilon), over the whole training. Labelled
        apart: an inversion attacker knows that the example is in the batch, so B1 is the one to trust.
        """
        if self.bound(kappa) is None:
            return None
        if self.sigma_eff == math.inf:
            return kappa
        grid = [0.05 * 1.25**k for k in range(30)]
        return min(1.0, *(math.exp(min(e, 700.0)) * kappa + self._delta(e) for e in grid))

    def _delta(self, epsilon: float) -> float:
        q, steps = exposure(self.sampling, self.sampling_rate, self.steps)
        if q == 1:
            return gaussian.delta_of(epsilon, math.sqrt(steps) / self.sigma_eff)
        return self.accountant.delta(sigma=self.sigma_eff, sampling_rate=q, steps=steps, epsilon=epsilon)


def guarantee(
    plan: Plan,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant,
    sampling: Sampling = "poisson",
    examples: int | None = None,
    seeded: bool = False,
    carries: Collection[str] = (),
    view: View | None = None,
) -> Guarantee:
    """What a plan may claim after ``steps`` messages.

    Args:
        plan: the policy resolved against a model.
        sampling_rate: public batch size / number of examples, in (0, 1].
        steps: number of messages released, at least 1.
        delta: in (0, 1); at most 1 / examples when those are given.
        accountant: composition for sampling rates below 1 (`dpguard.guarantee` supplies it).
        sampling: ``poisson``, or ``shuffle`` for fixed shuffled batches, which get no amplification
            (Chua et al., arXiv 2403.17673): every step in which the example appears counts with q = 1.
        examples: the public number of examples of the client.
        seeded: the noise comes from a seed, which the statement then says.
        carries: un-noised state that the client keeps between messages and that feeds later ones, any of
            `reasons.CARRIES`: ``error_feedback``, ``clean_momentum``, ``clean_local_training``.
        view: for the statement, where the server does not see each client's messages.

    Raises:
        UserError: an argument out of range.
    """
    unit: Unit = "client" if plan.unit == "update" else "example"
    check_arguments(sampling_rate, steps, delta, sampling, examples if unit == "example" else None)
    if unit == "client":
        sampling_rate = 1.0  # the server sees each message of the client: its absence is never a secret (F10)
    reasons = why_infinite(plan, steps, carries)
    sigma = 0.0 if reasons else sigma_eff(plan, steps)
    q, exposed = exposure(sampling, sampling_rate, steps)
    epsilon = math.inf if reasons else _epsilon(sigma, q, exposed, delta, accountant)
    words = compose(
        plan, epsilon=epsilon, delta=delta, sigma_eff=sigma, sampling_rate=sampling_rate, steps=steps,
        sampling=sampling, examples=examples, reasons=reasons, seeded=seeded, view=view,
        once=bool(reasons) and not why_infinite(plan, 1, carries),
    )  # fmt: skip
    return Guarantee(epsilon, delta, sigma, sampling_rate, steps, reasons, words, sampling, accountant, unit)


def group_mu(group: Group, steps: int) -> float:
    """C / smallest noise std of the group: sensitivity of the whitened query (infinity without noise).

    Of one single message only the shared members are seen; later messages depend on the withheld ones too,
    unless the whole update is clipped.
    """
    least = min(rule.noise for rule in group.rules if rule.share or _state_counts(group, steps))
    return math.inf if least == 0 else 1 / least


def counted_groups(plan: Plan, steps: int) -> list[Group]:
    """Groups that a guarantee must count: every group with something on the wire, and, when there is more
    than one message, the withheld ones that train (their state feeds later messages)."""
    return [g for g in plan.groups.values() if _state_counts(g, steps) or any(rule.share for rule in g.rules)]


def _state_counts(group: Group, steps: int) -> bool:
    # Clipping the whole update bounds what the client's state, however it came about, does to a message.
    return steps > 1 and group.unit == "example"


def quantile_mu(group: Group) -> float:
    """Sensitivity / std of a group's noised count: an example moves it by 1/2; 0 for a fixed clip."""
    return 0.0 if group.quantile is None else 1 / (2 * group.quantile.count_noise)


def sigma_eff(plan: Plan, steps: int) -> float:
    """Effective noise multiplier of one of ``steps`` messages: infinity when nothing leaves, 0 without noise."""
    if not plan.shared:
        return math.inf
    mu = math.hypot(*(m for g in counted_groups(plan, steps) for m in (group_mu(g, steps), quantile_mu(g))))
    return math.inf if mu == 0 else 1 / mu


def _epsilon(sigma: float, q: float, steps: int, delta: float, accountant: Accountant) -> float:
    if sigma in (0, math.inf):  # 0: noise so small that its inverse is no number
        return math.inf if sigma == 0 else 0.0
    exact = gaussian.epsilon_of(math.sqrt(steps) / sigma, delta)
    if q == 1 or math.isinf(exact):
        return exact
    # Without sampling the example is in every message: never better for privacy, so also an upper bound.
    return min(exact, accountant.epsilon(sigma=sigma, sampling_rate=q, steps=steps, delta=delta))


def exposure(sampling: Sampling, sampling_rate: float, steps: int) -> tuple[float, int]:
    """(sampling rate, steps) that the accountant composes.

    Of shuffled batches: in how many one example can be. A pass has at least floor(1 / rate) of them, the last one
    dropped or not.
    """
    if sampling == "shuffle" and sampling_rate < 1:
        return 1.0, math.ceil(steps / max(1, math.floor(1 / sampling_rate + 1e-9)))
    return sampling_rate, steps


def plain_epsilon(value: float) -> float | str:
    """Epsilon, or a noise multiplier, as JSON can hold it.

    >>> plain_epsilon(math.inf), plain_epsilon(2.5)
    ('inf', 2.5)
    """
    return "inf" if value == math.inf else value


def check_arguments(q: float, steps: int, delta: float, sampling: str, examples: int | None) -> None:
    """What `guarantee` refuses.

    Raises:
        UserError: an argument out of range.
    """
    if not 0 < q <= 1:
        raise UserError(f"sampling rate is {q!r}; expected a number above 0 and at most 1")
    if not math.isfinite(steps) or steps != int(steps) or steps < 1:
        raise UserError(f"steps is {steps!r}; expected a whole number of at least 1")
    check_delta(delta, examples)
    if sampling not in ("poisson", "shuffle"):
        raise UserError(f"unknown sampling {sampling!r}{did_you_mean(sampling, ['poisson', 'shuffle'])}")


def check_delta(delta: float, examples: int | None) -> None:
    """Refuse a delta that promises nothing to one of so many examples.

    Raises:
        UserError: an argument out of range, or a delta above one over the number of examples.
    """
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta!r}; expected a number above 0 and below 1")
    if examples is not None and examples < 1:
        raise UserError(f"examples is {examples!r}; expected a whole number of at least 1")
    if examples is not None and delta > 1 / examples:
        raise UserError(f"delta is {delta:g}, larger than 1 / {examples} examples; expected at most {1 / examples:.1e}")
