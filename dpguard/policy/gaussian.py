"""Closed forms of the Gaussian mechanism: exact, and stable where epsilon is in the thousands.

Balle and Wang, ICML 2018 (arXiv 1805.06530), Theorem 8; Dong, Roth and Su (arXiv 1905.02383), Cor. 3.3.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

FAR = 1e8
"""Beyond this mu epsilon is told by its upper bound."""


def delta_of(epsilon: float, mu: float) -> float:
    """Smallest delta of a mu-Gaussian mechanism (sensitivity / std = mu) at this epsilon.

    >>> round(delta_of(1.0, 1.0), 6)
    0.126937
    """
    if mu == 0:
        return 0.0
    first = log_ndtr(-epsilon / mu + mu / 2)
    second = epsilon + log_ndtr(-epsilon / mu - mu / 2)
    return float(max(0.0, math.exp(first) * -math.expm1(min(0.0, second - first))))


def epsilon_of(mu: float, delta: float) -> float:
    """Exact epsilon of a mu-Gaussian mechanism: the root of `delta_of`. Infinite mu gives infinity.

    >>> round(epsilon_of(1.0, 1e-5), 3)
    4.377
    """
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1.0
    if mu > FAR:  # the root is lost in rounding, and this bound, infinity included, is not 1e-7 of it away
        return high
    return float(
        brentq(
            lambda e: math.log(max(delta_of(e, mu), 1e-300)) - math.log(delta),
            0.0,
            high,
            xtol=1e-12,
            rtol=1e-14,
        )
    )


def success_bound(kappa: float, mu: float) -> float:
    """Largest chance that an attack meets its event after a mu-Gaussian release, from kappa before it.

    Hayes, Mahloujifar and Balle (arXiv 2302.07225, Thm 2); Kulynych et al. (arXiv 2507.06969).

    >>> round(success_bound(0.05, 1.0), 2)
    0.26
    """
    return float(ndtr(ndtri(kappa) + mu))
