"""Intervals and comparisons: bootstrap over targets and seeds, exact for proportions. numpy and scipy only.

Three habits hold everywhere. Units and seeds are resampled as wholes: a unit is a target, or a message where one
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
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import rel_entr

CONFIDENCE = 0.95
DRAWS = 2000
UTILITY_METRICS = ("accuracy", "f1", "mcc")

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


@lru_cache(maxsize=16)
def resamples(n: int, draws: int, seed: int) -> Floats:
    """How often each of ``n`` things appears in each bootstrap sample: shape (draws, n), rows sum to n."""
    counts = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights


def bootstrap_means(values: ArrayLike, counts: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Means over units and seeds in every bootstrap sample of units and of seeds.

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
    options, units, seeds = sums.shape
    of_units = resamples(units, draws, seed)

    def drawn(array: Floats) -> Floats:
        flat = of_units @ array.transpose(1, 0, 2).reshape(units, options * seeds)
        if seeds == 1:
            return flat
        of_seeds = resamples(seeds, draws, seed + 1)[:, None, :]
        summed: Floats = (flat.reshape(draws, options, seeds) * of_seeds).sum(axis=2)
        return summed

    total = drawn(sums)
    if (many == many.flat[0]).all():  # nothing is missing: every sample holds as many scores
        return total / max(float(many[0].sum()), 1.0)
    count = drawn(many)
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
class Drawn:
    """An estimate with its bootstrap samples.

    Two with the same units were resampled alike, so the difference of their samples is paired.

    Attributes:
        value: the point estimate.
        samples: of the bootstrap, shape (draws,).
        units: what was resampled: targets, or messages of several targets.
        seeds: how many seeds.
    """

    value: float
    samples: Floats
    units: tuple[Hashable, ...]
    seeds: int = 1

    def interval(self, bounds: tuple[float, float] | None = (0.0, 1.0), *, confidence: float = CONFIDENCE) -> Interval:
        """The percentile interval, as wide as Student's t asks of so few units (`small`).

        ``bounds``: least and greatest possible value, to widen by `reach`.
        """
        tail, n = (1 - confidence) / 2, len(self.units)
        known = self.samples if np.isfinite(self.samples).all() else self.samples[np.isfinite(self.samples)]
        ends = quantiles(known, (tail, 1 - tail))
        ends = self.value + small(n, confidence=confidence) * (ends - self.value)
        low, high = widened(ends, self.value, n, bounds, confidence)
        return Interval(self.value, low, high, n, self.seeds)

    def minus(self, other: Drawn) -> Interval | None:
        """This less another with its paired interval; None when they do not rest on the same units."""
        if self.units != other.units:
            return None
        less = Drawn(self.value - other.value, self.samples - other.samples, self.units, min(self.seeds, other.seeds))
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
    seeds = int((many[best].sum(axis=0) > 0).sum())
    return Drawn(float(means[best]), samples, names, seeds), best


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


def from_confusion(confusion: ArrayLike, metric: str) -> Floats:
    """Accuracy, F1 or Matthews correlation from confusion counts.

    F1 is that of class 1 when there are two classes (as GLUE has it), else the mean over classes. Matthews
    correlation for many classes is Gorodkin's R_K (Comput. Biol. Chem. 28, 2004). Undefined ratios are 0.

    Args:
        confusion: shape (..., classes, classes), true class first.
        metric: accuracy, f1 or mcc.

    Returns:
        Shape (...).

    >>> float(from_confusion([[3, 1], [0, 4]], "accuracy"))
    0.875

    Raises:
        ValueError: the metric has another name.
    """
    table = np.asarray(confusion, dtype=np.float64)
    return from_counts(np.diagonal(table, axis1=-2, axis2=-1), table.sum(axis=-1), table.sum(axis=-2), metric)


def from_counts(hits: ArrayLike, true: ArrayLike, guessed: ArrayLike, metric: str) -> Floats:
    """The same from counts of each class alone, which take the memory of its number and not of its square.

    Args:
        hits: shape (..., classes), examples of the class that were said to be.
        true: examples of the class.
        guessed: examples said to be of the class.
        metric: accuracy, f1 or mcc.

    Returns:
        Shape (...).

    Raises:
        ValueError: the metric has another name.
    """
    hits, true, guessed = (np.asarray(counts, dtype=np.float64) for counts in (hits, true, guessed))
    total = true.sum(axis=-1)
    if metric == "accuracy":
        return _ratio(hits.sum(axis=-1), total)
    if metric == "f1":
        each = _ratio(2 * hits, true + guessed)
        scores: Floats = each[..., 1] if hits.shape[-1] == 2 else each.mean(axis=-1)
        return scores
    if metric == "mcc":
        covariance = hits.sum(axis=-1) * total - (true * guessed).sum(axis=-1)
        spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (guessed**2).sum(axis=-1))
        return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))
    raise ValueError(f"metric is {metric!r}, expected one of: {', '.join(UTILITY_METRICS)}")


def _ratio(over: Any, under: Any) -> Floats:
    over, under = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    out: Floats = np.zeros(np.broadcast(over, under).shape)
    np.divide(over, under, out=out, where=under > 0)
    return out


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
