from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given
from hypothesis import strategies as st

from dpguard.policy import gaussian


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 3.0, 8.0])
def test_epsilon_agrees_with_an_independent_accountant(mu):
    independent = pld.from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-4).get_epsilon_for_delta(1e-5)
    assert gaussian.epsilon_of(mu, 1e-5) == pytest.approx(independent, rel=2e-3, abs=2e-3)


@given(st.floats(0.01, 200), st.floats(1e-12, 0.5))
def test_epsilon_is_the_root_of_delta(mu, delta):
    epsilon = gaussian.epsilon_of(mu, delta)
    if epsilon == 0:
        assert gaussian.delta_of(0, mu) <= delta
    else:
        assert gaussian.delta_of(epsilon, mu) == pytest.approx(delta, rel=1e-6)


def test_monte_carlo_of_delta():
    rng = np.random.default_rng(0)
    mu, epsilon = 1.5, 1.0
    x = rng.normal(mu, 1, 2_000_000)
    loss = mu * x - mu**2 / 2
    assert gaussian.delta_of(epsilon, mu) == pytest.approx(np.maximum(0, 1 - np.exp(epsilon - loss)).mean(), rel=5e-3)


def test_extremes():
    assert gaussian.epsilon_of(0, 1e-5) == 0
    assert gaussian.epsilon_of(math.inf, 1e-5) == math.inf
    assert gaussian.epsilon_of(1000.0, 1e-5) == pytest.approx(504_264, rel=1e-3)


@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.9])
def test_where_the_root_is_lost_in_rounding_epsilon_is_an_upper_bound(delta):
    """Tiny noise: the search ended in a traceback from mu = 1e35 or so on, and below the truth before."""
    at = [gaussian.epsilon_of(mu, delta) for mu in (0.999 * gaussian.FAR, 1.001 * gaussian.FAR, 1e20, 1e100, 1e150)]
    assert at == sorted(at)
    assert all(epsilon >= 0.5 * mu**2 for epsilon, mu in zip(at[2:], (1e20, 1e100, 1e150), strict=True))
    assert at[1] == pytest.approx(at[0] * (1.001 / 0.999) ** 2, rel=1e-6)
    assert gaussian.epsilon_of(1e200, delta) == math.inf


@pytest.mark.parametrize(
    ("kappa", "mu", "bound"),
    [
        (0.05, 0.5, 0.126),
        (0.05, 1, 0.26),
        (0.05, 2, 0.64),
        (0.05, 4, 0.99),
        (1e-6, 10, 1.0),
        (1e-6, 5, 0.60),
        (1e-6, 2, 0.0029),
        (1e-6, 1, 8.7e-5),
    ],
)
def test_reconstruction_bound(kappa, mu, bound):
    assert gaussian.success_bound(kappa, mu) == pytest.approx(bound, rel=0.04)


@pytest.mark.parametrize("mu", [0.05, 1.0, 12.0, 52.65, 400.0])
def test_the_closed_form_against_sixty_digits(mu):
    epsilon = gaussian.epsilon_of(mu, 1e-5)
    with mpmath.workdps(60):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        delta = mpmath.ncdf(-e / m + m / 2) - mpmath.exp(e) * mpmath.ncdf(-e / m - m / 2)
    assert float(delta) == pytest.approx(1e-5, rel=1e-6)
