"""Intervals and comparisons: bootstrap over targets and seeds, exact for proportions. numpy and scipy only.

Three habits hold everywhere. Units are resampled as wholes: a unit is a target, or a message where one
holds several targets, since scores of one unit are not independent of each other. Every resample comes from one
explicit seed, so equal inputs give equal intervals, and arrays that list the same units in the same order are
resampled alike, which is what makes a difference paired. And an interval is never narrower than the number of units
allows: see `reach`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import rel_entr

CONFIDENCE = 0.95
DRAWS = 2000
PUBLIC_WANTED = 10_000
"""Public texts that an estimate of what a guess scores (kappa) wants; with fewer its upper limit is wider."""
ROUNDING = 1e-12
"""A variance of scores that is no more than the rounding of equal ones."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its interval.

    Attributes:
        value: the point estimate.
        low: the lower end.
        high: the upper end.
        n: how many independent things (targets, messages, test examples, trials) it rests on.
        seeds: how many seeds.
        texts: how many texts those hold, where they are messages of several; else 0.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1
    texts: int = 0


@lru_cache(maxsize=4096)
def binomial(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Exact interval of a proportion (Clopper and Pearson, Biometrika 26, 1934).

    >>> interval = binomial(0, 50)
    >>> round(interval.high, 4)
    0.0711

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    test = scipy.stats.binomtest(successes, trials)
    ends = test.proportion_ci(confidence_level=confidence, method="exact")
    return Interval(successes / trials, float(ends.low), float(ends.high), trials)


def reach(n: int, *, confidence: float = CONFIDENCE) -> float:
    """The least share of all targets that ``n`` drawn ones can speak for, at this confidence.

    A kind of target with probability p is absent from n draws with probability (1 - p)^n, so up to
    p = 1 - reach(n) may have gone unseen. An interval of a bounded mean is widened until it allows that the
    unseen kind lies at either bound; for n equal zeros or ones this is exactly the interval of `binomial`,
    where a plain bootstrap would claim certainty.

    >>> round(1 - reach(50), 4)
    0.0711
    """
    return float(((1 - confidence) / 2) ** (1 / n))


@lru_cache(maxsize=256)
def small(n: int, *, freedom: float | None = None, confidence: float = CONFIDENCE) -> float:
    """How much wider than its percentiles a bootstrap interval of ``n`` units has to be.

    A bootstrap of n units has the variance (n - 1) / n of the right one, and takes the normal law where Student's t
    would stand (Hesterberg, arXiv 1411.5279, section 4.2.3).

    Args:
        n: number of units.
        freedom: degrees of freedom where they are not n - 1; the variance is then taken as it is.
        confidence: of the interval.
    """
    if n < 2:
        return 1.0
    right = 1 - (1 - confidence) / 2
    ratio = float(scipy.stats.t.ppf(right, freedom or n - 1) / scipy.stats.norm.ppf(right))
    return ratio if freedom else ratio * math.sqrt(n / (n - 1))


def joint_freedom(added: float, seeds: int, spread: float, units: int) -> float:
    """Degrees of freedom of a sum of two variances, at least 1 (Satterthwaite, Biometrics Bulletin 2, 1946).

    Args:
        added: what the seeds add to the variance, above 0.
        seeds: how many, at least 2.
        spread: the variance that comes of the units.
        units: how many.
    """
    parts = added**2 / (seeds - 1) + spread**2 / max(units - 1, 1)
    return max((added + spread) ** 2 / parts, 1.0)


@lru_cache(maxsize=16)
def resamples(n: int, draws: int, seed: int) -> Floats:
    """How often each of ``n`` things appears in each bootstrap sample: shape (draws, n), rows sum to n."""
    counts = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights


def bootstrap_means(values: ArrayLike, counts: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Means over units and seeds in every bootstrap sample of units; for the part of the seeds see `Drawn`.

    Args:
        values: shape (options, units, seeds); NaN where an option has no score. With ``counts`` they are sums.
        counts: how many scores each sum is made of, the same shape; 0 where there is none.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        Shape (draws, options); NaN where a sample holds no score of the option.
    """
    sums = np.asarray(values, dtype=np.float64)
    if counts is None:
        known = np.isfinite(sums)
        sums, counts = np.where(known, sums, 0.0), known
    many = np.asarray(counts, dtype=np.float64)
    of_units = resamples(sums.shape[1], draws, seed)
    total: Floats = of_units @ sums.sum(axis=2).T
    if (many == many.flat[0]).all():  # nothing is missing: every sample holds as many scores
        return total / max(float(many[0].sum()), 1.0)
    count = of_units @ many.sum(axis=2).T
    means: Floats = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return means


def quantiles(values: Floats, levels: Sequence[float]) -> Floats:
    """What ``numpy.quantile`` gives for finite values in one dimension, at a quarter of its time for 2,000 of them.

    >>> quantiles(np.array([3.0, 1.0, 2.0]), (0.0, 0.25)).tolist()
    [1.0, 1.5]
    """
    ordered = np.sort(values)
    at = np.asarray(levels) * (len(ordered) - 1)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    part = at - below
    ends: Floats = ordered[below] + part * (ordered[above] - ordered[below])
    return ends


@dataclass(frozen=True, eq=False)
class OfSeeds:
    """The same estimate under each of several seeds.

    Attributes:
        values: shape (seeds,).
        samples: in every bootstrap sample of the units, shape (draws, seeds); NaN where one holds none of a seed's.
    """

    values: Floats
    samples: Floats

    def variance(self, units: int) -> float:
        """What the seeds add to the variance of the mean over them, beyond what the ``units`` of each explain.

        0 where they differ no more than other units would make them differ: seeds with targets of their own do.
        """
        noise = self.samples - self.values
        noise = noise - np.nanmean(noise, axis=1, keepdims=True)
        seeds = len(self.values)
        explained = float(np.nansum(noise**2, axis=1).mean()) / (seeds - 1) * units / max(units - 1, 1)
        beyond = float(self.values.var(ddof=1)) - explained
        return beyond / seeds if beyond > ROUNDING else 0.0

    def shifts(self, variance: float, seed: int) -> Floats:
        """What resampled seeds move the mean by, shape (draws,): of exactly this variance in the long run."""
        seeds, apart = len(self.values), self.values - self.values.mean()
        moved = resamples(seeds, len(self.samples), seed) @ apart / seeds
        scaled: Floats = moved * math.sqrt(variance * seeds / float(apart.var()))
        return scaled


@dataclass(frozen=True, eq=False)
class Drawn:
    """An estimate with its bootstrap samples.

    Two with the same units were resampled alike, so the difference of their samples is paired.

    Attributes:
        value: the point estimate.
        samples: of the bootstrap over units, shape (draws,).
        units: what was resampled: targets, or messages of several targets.
        seeds: how many seeds.
        of_seeds: the estimate under each seed, where there are several.
    """

    value: float
    samples: Floats
    units: tuple[Hashable, ...]
    seeds: int = 1
    of_seeds: OfSeeds | None = None

    def interval(self, bounds: tuple[float, float] | None = (0.0, 1.0), *, confidence: float = CONFIDENCE) -> Interval:
        """The percentile interval, as wide as Student's t asks of so few units and seeds.

        A few seeds resampled among themselves vary too little: what they add beyond the units is scaled to its
        unbiased variance, and the whole to Student's t at the degrees of freedom of the sum (Satterthwaite, Biometrics
        Bulletin 2, 1946). ``bounds``: least and greatest possible value, to widen by `reach`.
        """
        tail, n = (1 - confidence) / 2, len(self.units)
        known = np.isfinite(self.samples)
        samples, added = self.samples, 0.0 if self.of_seeds is None else self.of_seeds.variance(n)
        freedom: float | None = None
        if self.of_seeds is not None and added > 0:
            spread = float(samples[known].var()) * n / max(n - 1, 1)
            freedom = joint_freedom(added, self.seeds, spread, n)
            samples = samples + self.of_seeds.shifts(added, 1)
        ends = quantiles(samples if known.all() else samples[known], (tail, 1 - tail))
        ends = self.value + small(n, freedom=freedom, confidence=confidence) * (ends - self.value)
        low, high = widened(ends, self.value, n, bounds, confidence)
        return Interval(self.value, low, high, n, self.seeds)

    def minus(self, other: Drawn) -> Interval | None:
        """This less another with its paired interval; None when they do not rest on the same units and seeds."""
        if self.units != other.units or self.seeds != other.seeds:
            return None
        apart = None
        if self.of_seeds is not None and other.of_seeds is not None:
            one, two = self.of_seeds, other.of_seeds
            apart = OfSeeds(one.values - two.values, one.samples - two.samples)
        less = Drawn(self.value - other.value, self.samples - other.samples, self.units, self.seeds, apart)
        return less.interval((-1.0, 1.0))


def largest(
    values: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    units: Sequence[Hashable] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Drawn, int]:
    """The largest mean over options, with the maximum taken anew inside every bootstrap sample.

    Choosing the best option first and giving its interval would forget that the choice was made on the same
    targets.

    Args:
        values: shape (options, units, seeds), for instance one option for every attack and position; NaN where there
            is no score. With ``counts`` they are sums.
        counts: how many scores each sum is made of.
        units: what the units are; counted from 0 by default.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The estimate, and the index of the option with the largest mean (the first of equals).

    Raises:
        ValueError: no score at all.
    """
    sums = np.asarray(values, dtype=np.float64)
    if counts is None:
        many = np.isfinite(sums).astype(np.float64)
        sums = np.where(many > 0, sums, 0.0)
    else:
        many = np.asarray(counts, dtype=np.float64)
    held = many.sum(axis=(0, 2)) > 0
    if not held.any():
        raise ValueError("no score to average")
    names = tuple(units or range(sums.shape[1]))
    if not held.all():
        names = tuple(unit for unit, kept in zip(names, held, strict=True) if kept)
        sums, many = sums[:, held], many[:, held]
    totals = many.sum(axis=(1, 2))
    means = np.divide(sums.sum(axis=(1, 2)), totals, out=np.full(len(sums), -np.inf), where=totals > 0)
    best = int(np.argmax(means))
    drawn = bootstrap_means(sums, many, draws=draws, seed=seed)
    samples = np.fmax.reduce(drawn, axis=1) if len(drawn.T) > 1 else drawn[:, 0]
    of_seeds = _of_seeds(sums[best], many[best], draws, seed)
    return Drawn(float(means[best]), samples, names, len(of_seeds.values) if of_seeds else 1, of_seeds), best


def _of_seeds(sums: Floats, many: Floats, draws: int, seed: int) -> OfSeeds | None:
    """One option's means under each seed that has scores, from arrays of shape (units, seeds); None of one seed."""
    held = many.sum(axis=0) > 0
    if held.sum() < 2:
        return None
    sums, many, of_units = sums[:, held], many[:, held], resamples(len(sums), draws, seed)
    count = of_units @ many
    samples = np.divide(of_units @ sums, count, out=np.full_like(count, np.nan), where=count > 0)
    return OfSeeds(sums.sum(axis=0) / many.sum(axis=0), samples)


def mean_interval(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean over targets and seeds, with targets and seeds resampled.

    Args:
        values: shape (targets,) or (targets, seeds); NaN where there is no score.
        bounds: as in `max_interval`.
        confidence: of the interval.
        draws: number of bootstrap samples.
        seed: of the resampling.

    >>> mean_interval([0.0, 0.5, 1.0]).value
    0.5

    Raises:
        ValueError: no score at all.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    return largest(array[None], draws=draws, seed=seed)[0].interval(bounds, confidence=confidence)


def lower_limit(mean: float, n: int, level: float) -> float:
    """Lower limit of the mean of ``n`` independent scores from 0 to 1 that holds with chance 1 - ``level``.

    The Chernoff form of Hoeffding's inequality (JASA 58, 1963, theorem 1): the q with n KL(mean, q) = -log(level).
    It needs no shape of the distribution.

    >>> round(lower_limit(1.0, 50, 0.025), 4), lower_limit(0.0, 50, 0.025)
    (0.9289, 0.0)
    """
    if mean <= 0:
        return 0.0
    mean = min(mean, 1.0)
    room = -math.log(level) / n

    def short(q: float) -> float:
        return float(rel_entr(mean, q) + rel_entr(1 - mean, 1 - q)) - room

    if mean == 1:
        return math.exp(-room)
    return float(brentq(short, 1e-12, mean)) if short(1e-12) > 0 else 0.0


def widened(
    quantiles: Floats, value: float, n: int, bounds: tuple[float, float] | None, confidence: float
) -> tuple[float, float]:
    """The ends of an interval around its value, no nearer than `reach` allows and inside the bounds."""
    low, high = min(float(quantiles[0]), value), max(float(quantiles[1]), value)
    if bounds is None:
        return low, high
    least, greatest = bounds
    share = reach(n, confidence=confidence)
    low, high = min(low, least + (value - least) * share), max(high, greatest - (greatest - value) * share)
    return max(low, least), min(high, greatest)
