"""Check P: batches are drawn by one independent coin an example, at the public rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from scipy import stats

from dpguard.engine.audit.report import Row, judged
from dpguard.engine.sampling import PoissonSampler

EXAMPLES, BATCH_SIZE, PASSES = 400, 40, 80
ALPHA = 1e-6

Sampler = Callable[[int, int, torch.Generator], Iterable[list[int]]]
"""(examples, public batch size, generator) -> the batches of one pass."""


def check(seed: int, sampler: Sampler = PoissonSampler) -> list[Row]:
    """The rows of check P that look at the sampler alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [indices for _ in range(PASSES) for indices in sampler(EXAMPLES, BATCH_SIZE, generator)]
    here = torch.zeros(len(drawn), EXAMPLES, dtype=torch.float64)
    for row, indices in zip(here, drawn, strict=True):
        row[indices] = 1.0
    q = BATCH_SIZE / EXAMPLES
    return [_rate(here, q), _counts(here, q), _sizes(here, q), _pairs(here - q, q), _rounds(here - q, q)]


def _two_sided(statistic: float, freedom: int) -> bool:
    return bool(stats.chi2.ppf(ALPHA / 2, freedom) <= statistic <= stats.chi2.isf(ALPHA / 2, freedom))


def _rate(here: torch.Tensor, q: float) -> Row:
    drawn, coins = int(here.sum()), here.numel()
    low, high = stats.binom.ppf(ALPHA / 2, coins, q), stats.binom.isf(ALPHA / 2, coins, q)
    figure, claim = f"{drawn / coins:.4f} of {coins:,} coins", f"q = {q:g}"
    return judged("P", "sampling rate", figure, claim, bool(low <= drawn <= high))


def _counts(here: torch.Tensor, q: float) -> Row:
    """A fixed number an example (shuffling) is as wrong as favourites."""
    rounds, examples = here.shape
    statistic = float(((here.sum(0) - rounds * q).square() / (rounds * q * (1 - q))).sum())
    what, figure = f"how often each of {examples} is drawn", f"chi-square {statistic:.0f}"
    return judged("P", what, figure, f"around {examples}", _two_sided(statistic, examples))


def _sizes(here: torch.Tensor, q: float) -> Row:
    """The variance of the batch size is the sum of all covariances: N q (1 - q) for independent coins."""
    rounds, examples = here.shape
    sizes = here.sum(1)
    statistic = float((sizes - examples * q).square().sum() / (examples * q * (1 - q)))
    claim = f"variance {examples * q * (1 - q):g}"
    return judged(
        "P", f"size of {rounds} batches", f"variance {float(sizes.var()):.1f}", claim, _two_sided(statistic, rounds)
    )


def _pairs(centred: torch.Tensor, q: float) -> Row:
    """Every pair of examples joins the same batch as often as independent coins say."""
    rounds, examples = centred.shape
    r = (centred.T @ centred / (rounds * q * (1 - q))).abs().fill_diagonal_(0.0)
    return _correlation("two examples in one batch", float(r.max()), rounds, examples * (examples - 1) // 2)


def _rounds(centred: torch.Tensor, q: float) -> Row:
    """No batch depends on an earlier one."""
    rounds, examples = centred.shape
    r = (centred @ centred.T / (examples * q * (1 - q))).abs().fill_diagonal_(0.0)
    return _correlation("two batches", float(r.max()), examples, rounds * (rounds - 1) // 2)


def _correlation(what: str, r: float, draws: int, pairs: int) -> Row:
    # products of two coins are skewed: Bernstein's inequality, which holds at any size, not a Gaussian tail
    q, level = BATCH_SIZE / EXAMPLES, math.log(2 * pairs / ALPHA)
    reach = (1 - q) / q * level / (3 * draws)
    limit = reach + math.sqrt(reach**2 + 2 * level / draws)
    return judged("P", what, f"correlation {r:.3f} at most", f"0 (chance: below {limit:.3f})", r <= limit)
