"""Intervals and comparisons: bootstrap over targets and seeds, exact for proportions. numpy and scipy only.

Three habits hold everywhere. Targets and seeds are resampled as wholes, since scores of one target under two
seeds are not two targets. Every resample comes from one explicit seed, so equal inputs give equal intervals,
and arrays that list the same targets in the same order are resampled alike, which is what makes a difference
paired. And an interval is never narrower than the number of targets allows: see `reach`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

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
        n: how many independent things (targets, test examples, trials) it rests on.
        seeds: how many seeds.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1


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


@lru_cache(maxsize=16)
def resamples(n: int, draws: int, seed: int) -> Floats:
    """How often each of ``n`` things appears in each bootstrap sample: shape (draws, n), rows sum to n."""
    counts = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights


def bootstrap_means(values: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Means over targets and seeds in every bootstrap sample of targets and of seeds.

    Args:
        values: shape (options, targets, seeds); NaN where an option has no score.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        Shape (draws, options); NaN where a sample holds no score of the option.
    """
    array = np.asarray(values, dtype=np.float64)
    options, targets, seeds = array.shape
    flat = array.transpose(1, 0, 2).reshape(targets, options * seeds)
    known = np.isfinite(flat)
    of_targets = resamples(targets, draws, seed)
    of_seeds = resamples(seeds, draws, seed + 1)[:, None, :]
    shape = (draws, options, seeds)
    total = ((of_targets @ np.where(known, flat, 0.0)).reshape(shape) * of_seeds).sum(axis=2)
    count = ((of_targets @ known.astype(np.float64)).reshape(shape) * of_seeds).sum(axis=2)
    means: Floats = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return means


def max_interval(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Interval, int]:
    """The largest mean over options, with the maximum taken anew inside every bootstrap sample.

    Choosing the best option first and giving its interval would forget that the choice was made on the same
    targets.

    Args:
        values: shape (options, targets, seeds), for instance one option for every attack and position; NaN
            where there is no score.
        bounds: least and greatest possible score, to widen by `reach`; None leaves the bootstrap alone.
        confidence: of the interval.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The interval, and the index of the option with the largest mean (the first of equals).

    Raises:
        ValueError: no score at all.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    options = np.flatnonzero(known.any(axis=(1, 2)))
    if options.size == 0:
        raise ValueError("no score to average")
    means = np.array([array[o][known[o]].mean() for o in options])
    best = int(options[int(np.argmax(means))])
    drawn = bootstrap_means(array[options], draws=draws, seed=seed)
    largest = np.max(np.where(np.isnan(drawn), -np.inf, drawn), axis=1)
    largest = largest[np.isfinite(largest)]
    tail = (1 - confidence) / 2
    value = float(means.max())
    n = int(known[best].any(axis=1).sum())
    low, high = _ends(np.quantile(largest, [tail, 1 - tail]), value, n, bounds, confidence)
    return Interval(value, low, high, n, int(known[best].any(axis=0).sum())), best


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
    interval, _ = max_interval(array[None], bounds=bounds, confidence=confidence, draws=draws, seed=seed)
    return interval


def mean_intervals(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Interval | None]:
    """As `mean_interval`, for many options at once: each gets the interval that it would get alone.

    Args:
        values: shape (options, targets, seeds); NaN where there is no score.
        bounds: as in `max_interval`.
        confidence: of each interval.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One interval an option; None where it has no score at all.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    drawn = bootstrap_means(array, draws=draws, seed=seed)
    tail = (1 - confidence) / 2
    out: list[Interval | None] = []
    for option in range(array.shape[0]):
        if not known[option].any():
            out.append(None)
            continue
        found = drawn[:, option][np.isfinite(drawn[:, option])]
        value = float(array[option][known[option]].mean())
        n = int(known[option].any(axis=1).sum())
        low, high = _ends(np.quantile(found, [tail, 1 - tail]), value, n, bounds, confidence)
        out.append(Interval(value, low, high, n, int(known[option].any(axis=0).sum())))
    return out


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of ``first - second`` over the targets and seeds that both have.

    Args:
        first: shape (targets,) or (targets, seeds).
        second: the same shape, the same targets in the same order.
        bounds: least and greatest possible difference, to widen by `reach`; None leaves the bootstrap alone.
        confidence: of the interval.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: the shapes differ, or no target is in both.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise ValueError(f"paired values have shapes {one.shape} and {two.shape}, expected equal ones")
    return mean_interval(one - two, bounds=bounds, confidence=confidence, draws=draws, seed=seed)


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
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    true, guessed, total = table.sum(axis=-1), table.sum(axis=-2), table.sum(axis=(-2, -1))
    if metric == "accuracy":
        return _ratio(hits.sum(axis=-1), total)
    if metric == "f1":
        each = _ratio(2 * hits, true + guessed)
        scores: Floats = each[..., 1] if table.shape[-1] == 2 else each.mean(axis=-1)
        return scores
    if metric == "mcc":
        covariance = hits.sum(axis=-1) * total - (true * guessed).sum(axis=-1)
        spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (guessed**2).sum(axis=-1))
        return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))
    raise ValueError(f"metric is {metric!r}, expected one of: {', '.join(UTILITY_METRICS)}")


def utility_interval(
    predictions: Sequence[Sequence[int]],
    labels: Sequence[int],
    metric: str = "accuracy",
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean over seeds of a classification metric, with seeds and test examples resampled.

    Test examples with equal label and equal predictions under all seeds are exchangeable, so whole kinds are
    drawn at once: the same distribution, at a cost that does not grow with the test set.

    Args:
        predictions: shape (seeds, examples), predicted class of the same examples in the same order.
        labels: shape (examples,), classes counted from 0.
        metric: accuracy, f1 or mcc.
        confidence: of the interval.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: nothing to judge, differing lengths, or an unknown metric.
    """
    truth = np.asarray(labels)
    guesses = np.asarray(predictions)
    if guesses.ndim != 2 or guesses.size == 0 or guesses.shape[1] != truth.shape[0]:
        raise ValueError(f"predictions have shape {guesses.shape}, expected (seeds, {truth.shape[0]})")
    seeds, examples = guesses.shape
    classes = 1 + max(1, int(truth.max()), int(guesses.max()))
    kinds, counts = np.unique(np.vstack([truth[None], guesses]), axis=1, return_counts=True)
    rng = np.random.default_rng([seed, examples])
    drawn = np.vstack([counts, rng.multinomial(examples, counts / examples, size=draws)]).astype(np.float64)
    scores = np.empty((draws + 1, seeds))
    for number in range(seeds):
        pairs = np.zeros((kinds.shape[1], classes, classes))
        pairs[np.arange(kinds.shape[1]), kinds[0], kinds[number + 1]] = 1
        scores[:, number] = from_confusion(np.tensordot(drawn, pairs, axes=1), metric)
    value = float(scores[0].mean())
    samples = (scores[1:] * resamples(seeds, draws, seed + 1)).mean(axis=1)
    tail = (1 - confidence) / 2
    bounds = (0.0, 1.0) if metric == "accuracy" else None
    low, high = _ends(np.quantile(samples, [tail, 1 - tail]), value, examples, bounds, confidence)
    return Interval(value, low, high, examples, seeds)


def _ratio(over: Any, under: Any) -> Floats:
    over, under = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    out: Floats = np.zeros(np.broadcast(over, under).shape)
    np.divide(over, under, out=out, where=under > 0)
    return out


def _ends(
    quantiles: Floats, value: float, n: int, bounds: tuple[float, float] | None, confidence: float
) -> tuple[float, float]:
    low, high = min(float(quantiles[0]), value), max(float(quantiles[1]), value)
    if bounds is None:
        return low, high
    least, greatest = bounds
    share = reach(n, confidence=confidence)
    return min(low, least + (value - least) * share), max(high, greatest - (greatest - value) * share)
