"""Check A: what `guarantee` claims is what the emitted tensors support, recomputed without the accountant's code."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import replace
from functools import lru_cache

from scipy import integrate, optimize

from dpguard.engine.accounting import guarantee
from dpguard.engine.audit.noise import Measured
from dpguard.engine.audit.report import Row, counted, judged, not_applicable
from dpguard.engine.audit.subject import Subject, sensitivity
from dpguard.policy.table import Plan

DELTA = 1e-5
RATE, STEPS = 0.01, 100
"""The subsampled composition that is compared with an independent accountant."""
ABOVE, ABOVE_BY = 1.01, 0.02
SMALL_SIGMA = 0.1
"""Below it, with epsilon in the hundreds, Opacus's PRV accountant may give up: the claim is then the looser RDP one."""
MEASURED = 0.04
"""Largest relative error of the measured sigma_eff, 5 standard errors at 20,000 draws and a minimum over groups."""


def check(subject: Subject, measured: Measured) -> list[Row]:
    """The rows of check A."""
    plan = subject.plan
    out = [_sigma(subject, 1, "sigma_eff of one message"), _sigma(subject, 2, "sigma_eff of a later message")]
    claimed = guarantee(plan, sampling_rate=1.0, steps=1, delta=DELTA)
    if not claimed.formal or claimed.sigma_eff == math.inf:
        reason = "epsilon is 0, as claimed: nothing leaves" if claimed.formal else "epsilon = inf, as claimed"
        return [*out, not_applicable("A", "sigma_eff as measured, epsilon", reason)]
    later = guarantee(plan, sampling_rate=1.0, steps=2, delta=DELTA)
    out += [_as_measured(subject, measured, claimed.sigma_eff), _closed_form(claimed.sigma_eff, claimed.epsilon)]
    if plan.unit == "update":
        out.append(
            not_applicable("A", f"epsilon of {STEPS} messages", "a client is in every message: no sampling helps")
        )
    elif later.formal:
        out.append(_independent(plan, later.sigma_eff))
    else:
        out.append(not_applicable("A", f"epsilon of {STEPS} messages", "inf from the second message on, as claimed"))
    return [*out, _silenced(plan)]


def _recomputed(subject: Subject, steps: int, measured: dict[str, float] | None = None) -> float:
    """1 / sqrt(sum (C/s)^2) from sensitivities and noise stds of the sum; 0 where no claim can be made.

    Args:
        subject: the plan and its batch size.
        steps: 1, or more: then withheld tensors count, because later messages depend on them.
        measured: tensor -> measured / claimed std; as claimed when None.
    """
    plan = subject.plan
    if not plan.shared:
        return math.inf
    if any(plan[name].clip is None for name in plan.shared):
        return 0.0
    # what is withheld feeds later messages, unless the whole update is clipped after all that fed it
    seen = [n for n in plan.trained if plan[n].share or (steps > 1 and plan[n].unit == "example")]
    if any(plan[name].std(subject.batch_size) == 0 or plan[name].clip is None for name in seen):
        return 0.0
    total, scale = 0.0, measured or {}
    for group in plan.groups.values():
        names = [name for name in group.names if name in seen]
        if names:
            least = min(plan[name].std(subject.batch_size) * scale.get(name, 1.0) for name in names)
            total += (sensitivity(group, subject.batch_size) / least) ** 2
        if names and group.quantile is not None:
            # an example moves the noised count by 1/2 (Andrew et al., arXiv 1905.03871, Thm 1)
            total += (0.5 / group.quantile.count_noise) ** 2
    return math.inf if total == 0 else 1 / math.sqrt(total)


def _sigma(subject: Subject, steps: int, what: str) -> Row:
    claimed = guarantee(subject.plan, sampling_rate=1.0, steps=steps, delta=DELTA)
    found = _recomputed(subject, steps)
    if found == math.inf:
        # a claim about nothing may be too cautious
        return judged("A", what, "nothing leaves", f"epsilon = {claimed.epsilon:.3g}", claimed.formal)
    if not claimed.formal:
        figure = "epsilon = inf, as claimed" if found == 0 else f"{found:.6g}, but {claimed.reasons[0]}"
        return judged("A", what, figure, "epsilon = inf", claimed.epsilon == math.inf and bool(claimed.reasons))
    holds = abs(claimed.sigma_eff / found - 1) <= 1e-9 if found else False
    return judged("A", what, f"{found:.9g}", f"{claimed.sigma_eff:.9g}", holds)


def _as_measured(subject: Subject, measured: Measured, claimed: float) -> Row:
    """sigma_eff from what the noised tensors show: C of the plan, std of the draws."""
    ratios = {name: measured.pooled(found).ratio for found in measured.classes for name in found.names}
    found = _recomputed(subject, 1, ratios)
    holds = abs(found / claimed - 1) <= MEASURED
    return judged("A", "sigma_eff as measured", f"{found:.4g}", f"{claimed:.4g} +- {100 * MEASURED:.0f} %", holds)


def _closed_form(sigma: float, epsilon: float) -> Row:
    """Epsilon of one message by a root of the tail integral, not by the closed form in normal tails.

    delta(epsilon) is the integral of max(0, 1 - e^(epsilon - loss)) over the privacy loss, which is Gaussian
    with mean mu^2/2 and variance mu^2.
    """
    mu = 1 / sigma

    def excess(guess: float) -> float:
        start = (guess - mu * mu / 2) / mu

        def tail(z: float) -> float:
            return -math.expm1(-mu * (z - start)) * math.exp((start * start - z * z) / 2)

        # scaled by the density at the start, so that tails of any height are integrated to the same digits
        value, _error = integrate.quad(
            tail, start, start + 12 + 12 / max(1.0, abs(start)), epsabs=0, epsrel=1e-12, limit=400
        )
        return math.log(value) - start * start / 2 - 0.5 * math.log(2 * math.pi) - math.log(DELTA)

    if epsilon == 0:
        return judged("A", "epsilon of one message, q = 1", "0", "0", excess(0.0) <= 1e-9)
    low, high = max(0.0, epsilon - 2 * mu - 0.1), epsilon + 2 * mu + 0.1
    what, claim = "epsilon of one message, q = 1", f"{epsilon:.10g} to 1e-9"
    if excess(low) < 0 or excess(high) > 0:
        return judged("A", what, f"outside {low:.4g} to {high:.4g}", claim, False)
    root = float(optimize.brentq(excess, low, high, xtol=1e-13, rtol=1e-14))
    return judged("A", what, f"{root:.10g}", claim, abs(root - epsilon) <= 1e-9 * max(1.0, epsilon))


def _independent(plan: Plan, sigma: float) -> Row:
    """Epsilon of many Poisson-sampled messages beside dp-accounting's privacy loss distributions."""
    what = f"epsilon of {STEPS} messages, q = {RATE:g}"
    if importlib.util.find_spec("dp_accounting") is None:
        return not_applicable("A", what, "dp-accounting is not installed")
    claimed = guarantee(plan, sampling_rate=RATE, steps=STEPS, delta=DELTA).epsilon
    other = _other_epsilon(sigma, max(1e-3, claimed / 2e4))
    holds = claimed >= other - max(1e-4, 1e-4 * other)
    claim = f"{other:.5g} or more"
    if sigma >= SMALL_SIGMA:
        holds = holds and claimed <= ABOVE * other + ABOVE_BY
        claim = f"{other:.5g}, at most 1 % + .02 above"
    return judged("A", what, f"{claimed:.5g}", claim, holds)


@lru_cache(maxsize=256)
def _other_epsilon(sigma: float, interval: float) -> float:
    """dp-accounting's upper bound; ``interval`` is the spacing of its grid of privacy losses."""
    losses = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    single = losses.from_gaussian_mechanism(sigma, sampling_prob=RATE, value_discretization_interval=interval)
    return float(single.self_compose(STEPS).get_epsilon_for_delta(DELTA))


def _silenced(plan: Plan) -> Row:
    """One shared tensor without noise, in any group, takes the claim away."""
    what = "epsilon with one shared tensor un-noised"
    wrong = ""
    groups = [g for g in plan.groups.values() if any(rule.sent for rule in g.rules)]
    for group in groups:
        rule = next(rule for rule in group.rules if rule.sent)
        silent = replace(plan, rules={**plan.rules, rule.slot.name: replace(rule, noise=0.0, noise_std=0.0)})
        if guarantee(silent, sampling_rate=1.0, steps=1, delta=DELTA).formal:
            wrong = rule.slot.name
    return judged(
        "A",
        what,
        f"finite without {wrong}" if wrong else f"inf in each of {counted(len(groups), 'group')}",
        "inf",
        not wrong,
    )
