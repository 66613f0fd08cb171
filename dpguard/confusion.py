"""Accuracy, F1 and Matthews correlation from confusion counts. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UTILITY_METRICS = ("accuracy", "f1", "mcc")

Floats = NDArray[np.float64]


def from_confusion(confusion: ArrayLike, metric: str, classes: int | None = None) -> Floats:
    """Accuracy, F1 or Matthews correlation from confusion counts.

    F1 is that of class 1 when the task has two classes (as GLUE has it), else the mean over those that occur.
    Matthews correlation for many classes is Gorodkin's R_K (Comput. Biol. Chem. 28, 2004). Undefined ratios are 0.

    Args:
        confusion: shape (..., K, K), true class first.
        metric: accuracy, f1 or mcc.
        classes: of the task, at most K; a head may name more, and which F1 it is must not hang on what a model said.
            None = K.

    Returns:
        Shape (...).

    >>> float(from_confusion([[3, 1], [0, 4]], "accuracy"))
    0.875

    Raises:
        ValueError: the metric has another name.
    """
    table = np.asarray(confusion, dtype=np.float64)
    return from_counts(np.diagonal(table, axis1=-2, axis2=-1), table.sum(axis=-1), table.sum(axis=-2), metric, classes)


def from_counts(
    hits: ArrayLike, true: ArrayLike, guessed: ArrayLike, metric: str, classes: int | None = None
) -> Floats:
    """The same from counts of each class alone, which take the memory of its number and not of its square.

    Args:
        hits: shape (..., K), examples of the class that were said to be.
        true: examples of the class.
        guessed: examples said to be of the class.
        metric: accuracy, f1 or mcc.
        classes: of the task; see `from_confusion`.

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
        named = (true + guessed)[..., :classes]
        each = _ratio(2 * hits[..., :classes], named)
        if each.shape[-1] == 2:
            one: Floats = each[..., 1]
            return one
        return _ratio(each.sum(axis=-1), (named > 0).sum(axis=-1))  # a class that nobody names has none
    if metric == "mcc":
        covariance = hits.sum(axis=-1) * total - (true * guessed).sum(axis=-1)
        spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (guessed**2).sum(axis=-1))
        return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))
    raise ValueError(f"metric is {metric!r}, expected one of: {', '.join(UTILITY_METRICS)}")


def classes_of(labels: Sequence[int]) -> int:
    """How many classes a task of these labels has at least: two, or up to the highest label.

    >>> classes_of([1, 1]), classes_of([0, 2])
    (2, 3)
    """
    return 1 + max(1, *labels)


def _ratio(over: Any, under: Any) -> Floats:
    over, under = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    out: Floats = np.zeros(np.broadcast(over, under).shape)
    np.divide(over, under, out=out, where=under > 0)
    return out
