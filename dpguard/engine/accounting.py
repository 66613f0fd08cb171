"""Composition of Poisson-subsampled Gaussians: Opacus's PRV accountant, RDP where PRV fails.

Opacus's GDP accountant is a central-limit approximation that under-reports and is not used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.prv import Domain
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from dpguard.policy import gaussian
from dpguard.policy.guarantee import Accountant, Guarantee, Sampling
from dpguard.policy.guarantee import guarantee as _guarantee
from dpguard.policy.statement import View
from dpguard.policy.table import Plan

LONG = 30_000
"""Beyond this many steps PRV's grid is made coarser, or a query takes a second."""
ALPHAS = [1 + step / 1000 for step in (1, 2, 4, 7, 10, 15, 20, 30, 45, 70)] + RDPAccountant.DEFAULT_ALPHAS
"""RDP orders: Opacus's, and smaller ones, without which an epsilon in the hundreds comes out far too large."""
PRV_ENDS = 800.0
"""Above this epsilon of RDP's (some 8 % above PRV's) e^epsilon overflows in PRV, after many seconds."""


class SubsampledGaussian:
    """`policy.guarantee.Accountant` on Opacus; queries are cached by their arguments."""

    def epsilon(self, *, sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
        """Upper bound on epsilon: PRV (error .01 and delta / 1000), or RDP where PRV raises."""
        return _epsilon(sigma, sampling_rate, steps, delta)

    def delta(self, *, sigma: float, sampling_rate: float, steps: int, epsilon: float) -> float:
        """Upper bound on delta at ``epsilon`` from the PRV curve; 1 where PRV fails (no bound)."""
        curve = _curve(sigma, sampling_rate, steps)
        return 1.0 if curve is None else float(np.clip(curve(epsilon), 0.0, 1.0))

    def compose(self, *, history: Sequence[tuple[float, float, int]], delta: float) -> float:
        """Upper bound on the joint epsilon of (sigma, sampling rate, steps) parts, in any order.

        Parts without sampling are one Gaussian, with mu^2 the sum of theirs; alone they have a closed form.
        """
        merged: dict[tuple[float, float], int] = {}
        mu_squared = 0.0
        for sigma, rate, steps in history:
            if rate == 1:
                mu_squared += steps / sigma**2
            else:
                merged[sigma, rate] = merged.get((sigma, rate), 0) + steps
        if not merged:
            return gaussian.epsilon_of(math.sqrt(mu_squared), delta)
        whole = [(mu_squared**-0.5, 1.0, 1)] if mu_squared else []
        return _joint_epsilon((*sorted((*key, steps) for key, steps in merged.items()), *whole), delta)


def _epsilon(sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
    return _joint_epsilon(((sigma, sampling_rate, steps),), delta)


@lru_cache(maxsize=4096)
def _joint_epsilon(parts: tuple[tuple[float, float, int], ...], delta: float) -> float:
    history = list(parts)
    loose = _rdp_epsilon(history, delta)
    tight = _prv_epsilon(history, delta, eps_error=_grid_error(loose, history)) if loose < PRV_ENDS else None
    return loose if tight is None else min(loose, tight)


def _grid_error(loose: float, history: Sequence[tuple[float, float, int]]) -> float:
    """Error of PRV's epsilon near ``loose``; what is printed is above the truth by twice this at most, 1 % + .02."""
    if sum(steps for _sigma, _rate, steps in history) > LONG:
        return 0.0095 + 0.0035 * loose
    return max(0.01, 0.003 * loose)


@lru_cache(maxsize=1024)
def _renyi(sigma: float, sampling_rate: float) -> NDArray[np.float64]:
    """Renyi divergence of one step at every order: the slow part, whatever the number of steps and delta."""
    found: NDArray[np.float64] = compute_rdp(q=sampling_rate, noise_multiplier=sigma, steps=1, orders=ALPHAS)
    return found


def _rdp_epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """RDP's upper bound: quick, valid at any noise multiplier, some per cent above PRV's."""
    spent = sum(steps * _renyi(sigma, rate) for sigma, rate, steps in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimal order is the largest alpha": a looser bound is still a bound
        return float(get_privacy_spent(orders=ALPHAS, rdp=spent, delta=delta)[0])


class _PRV(PRVAccountant):  # type: ignore[misc]
    """Opacus's, with the domain of its grid (Gopi et al., arXiv 2106.02848, Remark 5.6) from the cached orders."""

    def _get_domain(
        self, *, prvs: object, num_self_compositions: Sequence[int], eps_error: float, delta_error: float
    ) -> Domain:
        steps = sum(num_self_compositions)
        reach = [_rdp_epsilon([(sigma, rate, 1)], delta_error / (8 * steps)) for sigma, rate, _steps in self.history]
        reach += [_rdp_epsilon(self.history, delta_error / 4), eps_error]
        mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
        return Domain.create_aligned(-max(reach) - 3, max(reach) + 3, mesh)


def _prv_epsilon(history: list[tuple[float, float, int]], delta: float, eps_error: float) -> float | None:
    """PRV's upper bound, or None where its discretisation fails (noise multipliers below about .05).

    Its grid has about epsilon / eps_error points: the error must grow with epsilon, or hundreds of millions
    of points are tried at small noise.
    """
    prv = _PRV()
    prv.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = float(prv.get_epsilon(delta=delta, eps_error=eps_error))
        except (ValueError, RuntimeError, ArithmeticError, MemoryError):
            return None
    return found if np.isfinite(found) and found >= 0 else None


@lru_cache(maxsize=256)
def _curve(sigma: float, sampling_rate: float, steps: int) -> Callable[[float], float] | None:
    """epsilon -> upper bound on delta, or None where PRV fails."""
    prv = _PRV()
    prv.history = [(sigma, sampling_rate, steps)]
    error = _grid_error(_rdp_epsilon(prv.history, 1e-6), prv.history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # fine enough for success bounds down to kappa = 1e-6
            composed = prv._get_dprv(eps_error=error, delta_error=1e-8)
        except (ValueError, RuntimeError, ArithmeticError, MemoryError):
            return None
    return lambda epsilon: float(composed.compute_delta_estimate(max(epsilon - error, 0.0))) + 1e-8


def guarantee(
    plan: Plan,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    sampling: Sampling = "poisson",
    examples: int | None = None,
    seeded: bool = False,
    carries: Collection[str] = (),
    accountant: Accountant | None = None,
    view: View | None = None,
) -> Guarantee:
    """`policy.guarantee.guarantee` with the PRV accountant: what ``dpguard.guarantee`` is."""
    return _guarantee(
        plan,
        sampling_rate=sampling_rate,
        steps=steps,
        delta=delta,
        accountant=accountant or SubsampledGaussian(),
        sampling=sampling,
        examples=examples,
        seeded=seeded,
        carries=carries,
        view=view,
    )


PLUGIN = SubsampledGaussian
"""The accountant that `policy` finds by name, because it may not import this room."""
