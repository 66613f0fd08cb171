"""What a policy is worth, and how two policies differ in it: test examples and seeds are resampled, in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpguard.confusion import classes_of, from_counts
from dpguard.stats import (
    CONFIDENCE,
    DRAWS,
    Floats,
    Interval,
    binomial,
    joint_freedom,
    quantiles,
    resamples,
    small,
    widened,
)

BOUNDS = {"accuracy": (0.0, 1.0), "f1": (0.0, 1.0), "mcc": (-1.0, 1.0)}
BLOCK = 4_000_000
"""Entries of the resampling's weights that are made at once."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A utility metric of one policy, with its bootstrap samples over test examples.

    Attributes:
        values: of every seed, shape (seeds,).
        samples: the same in every bootstrap sample of the test examples, shape (draws, seeds).
        examples: how many test examples.
        bounds: least and greatest possible value.
        right: of accuracy under one seed, how many predictions are right; else None.
    """

    values: Floats
    samples: Floats
    examples: int
    bounds: tuple[float, float]
    right: int | None = None

    def interval(self, *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
        """Mean over seeds, with seeds and test examples resampled.

        A few seeds resampled among themselves vary too little: their part is scaled to its unbiased variance, and
        the whole to Student's t at the degrees of freedom of the sum (Satterthwaite, Biometrics Bulletin 2, 1946),
        so that two seeds that disagree give a wide interval and two that agree a narrow one. Under one seed the
        luck of training is not in the interval. Accuracy under one seed is a proportion: never narrower than exact.
        """
        seeds, draws = self.values.size, len(self.samples)
        value = float(self.values.mean())
        of_examples = self.samples.mean(axis=1)
        spread = float(of_examples.var())
        between = float(self.values.var(ddof=1)) / seeds if seeds > 1 else 0.0
        samples, freedom = of_examples, float(self.examples - 1)
        if between > 0:
            weights = 1 + np.sqrt(seeds / (seeds - 1)) * (resamples(seeds, draws, seed + 1) - 1)
            samples = (self.samples * weights).mean(axis=1)
            freedom = joint_freedom(between, seeds, spread, self.examples)
        tail = (1 - confidence) / 2
        ends = quantiles(samples, (tail, 1 - tail))
        ends = value + small(self.examples, freedom=max(freedom, 1.0), confidence=confidence) * (ends - value)
        low, high = widened(ends, value, self.examples, self.bounds, confidence)
        if self.right is not None:
            exact = binomial(self.right, self.examples, confidence=confidence)
            low, high = min(low, exact.low), max(high, exact.high)
        return Interval(value, low, high, self.examples, seeds)

    def minus(self, other: Judged) -> Interval | None:
        """This less another with its paired interval; None when they were not judged under as many seeds."""
        if (self.examples, self.values.size) != (other.examples, other.values.size):
            return None
        most = self.bounds[1] - self.bounds[0]
        return replace(
            self, values=self.values - other.values, samples=self.samples - other.samples, bounds=(-most, most),
            right=None,
        ).interval()  # fmt: skip


def judge(
    predictions: Sequence[Sequence[int]],
    labels: Sequence[int],
    metric: str = "accuracy",
    *,
    classes: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Judged:
    """A classification metric under every seed, and in every bootstrap sample of the test examples.

    Policies judged on the same examples are resampled alike, which makes their differences paired.

    Args:
        predictions: shape (seeds, examples), predicted class of the same examples in the same order.
        labels: shape (examples,), classes counted from 0.
        metric: accuracy, f1 or mcc.
        classes: of the task; None = those of the labels. A head may name more.
        draws: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: nothing to judge, differing lengths, or an unknown metric.
    """
    truth, guesses = np.asarray(labels), np.asarray(predictions)
    if guesses.ndim != 2 or guesses.size == 0 or guesses.shape[1] != truth.shape[0]:
        raise ValueError(f"predictions have shape {guesses.shape}, expected (seeds, {truth.shape[0]})")
    seeds, examples = guesses.shape
    if metric == "accuracy":
        scores = _sums((guesses == truth).T, draws, seed) / examples
    else:
        classes = classes or classes_of(labels)
        each = np.arange(max(classes, 1 + int(truth.max()), 1 + int(guesses.max())))
        said = guesses.T[:, :, None] == each  # (examples, seeds, classes)
        meant = np.broadcast_to((truth[:, None] == each)[:, None], said.shape)
        hits, true, guessed = (_sums(flags, draws, seed) for flags in (said & meant, meant, said))
        scores = from_counts(hits, true, guessed, metric, classes)
    right = int((guesses == truth).sum()) if metric == "accuracy" and seeds == 1 else None
    return Judged(scores[0], scores[1:], examples, BOUNDS[metric], right)


def _sums(flags: NDArray[np.bool_], draws: int, seed: int) -> NDArray[np.float64]:
    """Sums over the examples (first axis), of all of them and in every bootstrap sample: (draws + 1, ...)."""
    columns = flags.reshape(len(flags), -1).astype(np.float32)
    sums = np.vstack([columns.sum(axis=0), _weighted(columns, draws, seed)]).astype(np.float64)
    return sums.reshape(draws + 1, *flags.shape[1:])


def _weighted(columns: NDArray[np.float32], draws: int, seed: int) -> NDArray[np.float32]:
    """Column sums in every bootstrap sample of the rows: shape (draws, columns). Small whole numbers: exact."""
    examples = len(columns)
    step = max(1, BLOCK // examples)
    blocks = range(0, draws, step)
    return np.vstack([_weights(examples, min(step, draws - at), seed, at) @ columns for at in blocks])


@lru_cache(maxsize=4)
def _weights(examples: int, draws: int, seed: int, block: int) -> NDArray[np.float32]:
    """How often each example appears in each of some bootstrap samples: shape (draws, examples)."""
    rng = np.random.default_rng([seed, examples, block])
    places = rng.integers(0, examples, size=(draws, examples)) + examples * np.arange(draws)[:, None]
    counts = np.bincount(places.ravel(), minlength=draws * examples).reshape(draws, examples)
    return counts.astype(np.float32)
