"""Utility over test examples and seeds: closed forms, and intervals that hold as often as they say."""

import numpy as np
import pytest

from dpguard.confusion import UTILITY_METRICS, from_confusion
from dpguard.measure.utility import confusion, scores
from dpguard.report.utility import judge
from dpguard.stats import binomial


def interval(predictions, labels, metric="accuracy", **more):
    return judge(predictions, labels, metric, **more).interval()


def test_utility_interval_is_the_bootstrap_over_examples():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, size=500)
    guesses = np.where(rng.random(500) < 0.8, labels, 1 - labels)
    got = interval([guesses.tolist()], labels.tolist(), draws=8000)
    accuracy = float((guesses == labels).mean())
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 500)
    assert got.value == pytest.approx(accuracy)
    assert got.low == pytest.approx(accuracy - half, abs=0.005)
    assert got.high == pytest.approx(accuracy + half, abs=0.005)
    assert (got.n, got.seeds) == (500, 1)


def test_utility_interval_widens_with_differences_between_seeds():
    labels = [0, 1] * 200
    good, poor = labels, [0] * 400
    together = interval([good, poor, good], labels)
    assert together.value == pytest.approx((1 + 0.5 + 1) / 3)
    assert together.low < 0.7
    assert together.high > 0.99


@pytest.mark.parametrize("metric", UTILITY_METRICS)
def test_utility_interval_holds_its_value_for_every_metric(metric):
    labels = [0, 1, 2, 1, 0, 2, 1, 1]
    found = interval([[0, 1, 2, 2, 0, 1, 1, 0], labels], labels, metric)
    assert found.low <= found.value <= found.high
    assert found.value < 1


def test_utility_interval_refuses_what_cannot_be_judged():
    with pytest.raises(ValueError, match="expected"):
        interval([[0, 1]], [0, 1, 1])
    with pytest.raises(ValueError, match="expected"):
        interval([], [0])
    assert interval([[0, 0]], [0, 0]).value == 1.0


def test_accuracy_of_one_training_is_never_narrower_than_the_exact_interval():
    labels = [0, 1] * 20
    for wrong in (0, 1, 7, 20):
        guesses = [1 - label if n < wrong else label for n, label in enumerate(labels)]
        got, exact = interval([guesses], labels), binomial(40 - wrong, 40)
        assert got.low <= exact.low
        assert got.high >= exact.high


def runs(rng, *, seeds, examples, between):
    """Predictions of trainings whose true accuracies differ by ``between`` around 0.8."""
    labels = np.zeros(examples, dtype=int)
    levels = 0.8 + rng.normal(0, between, seeds)
    return [(rng.random(examples) > level).astype(int).tolist() for level in levels], labels.tolist()


@pytest.mark.parametrize(("seeds", "between"), [(3, 0.08), (3, 0.0), (5, 0.04)])
def test_the_interval_covers_the_true_accuracy(seeds, between):
    rng = np.random.default_rng([seeds, round(100 * between)])
    covered = 0
    for trial in range(150):
        predictions, labels = runs(rng, seeds=seeds, examples=200, between=between)
        got = interval(predictions, labels, draws=300, seed=trial)
        covered += got.low <= 0.8 <= got.high
    assert covered >= 136


@pytest.mark.parametrize("metric", UTILITY_METRICS)
def test_policies_on_the_same_examples_differ_in_pairs(metric):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 300)
    better = np.where(rng.random((2, 300)) < 0.7, labels, 1 - labels)
    worse = better.copy()
    worse[:, :12] = 1 - labels[:12]
    one, two = (judge(found.tolist(), labels.tolist(), metric) for found in (better, worse))
    less = one.minus(two)
    assert less.value == pytest.approx(one.interval().value - two.interval().value)
    assert less.low > 0
    assert one.interval().low < two.interval().high
    assert judge([labels.tolist()], labels.tolist(), metric).minus(one) is None


def test_f1_is_of_the_task_whatever_classes_a_model_names():
    """A head of three classes on texts of two: one stray answer must not make it another metric."""
    labels = [1] * 10 + [0] * 10
    one = [1] * 6 + [0] * 4 + [1] * 4 + [0] * 6
    two = [1] * 6 + [0] * 3 + [2] + [1] * 4 + [0] * 6  # one wrong answer is another wrong answer
    expected = 2 * 6 / (10 + 10)
    for guesses in (one, two):
        table = confusion(guesses, labels)
        assert float(from_confusion(table, "f1", 2)) == pytest.approx(expected)
        assert scores(guesses, labels, 0.5)["f1"] == pytest.approx(expected)
        for classes in (None, 2):
            assert judge([guesses], labels, "f1", classes=classes).interval().value == pytest.approx(expected)
    assert judge([two], labels, "f1").minus(judge([one], labels, "f1")).value == pytest.approx(0)


def test_a_task_of_three_classes_keeps_its_f1_where_the_test_texts_lack_one():
    """Against the formula over classes 0 to 2: the mean of those that occur."""
    labels, guesses = [0, 0, 1, 1], [0, 1, 1, 1]
    mean = (2 * 1 / 3 + 2 * 2 / 5) / 2
    assert judge([guesses], labels, "f1", classes=3).interval().value == pytest.approx(mean)
    assert scores(guesses, labels, 0.5, 3)["f1"] == pytest.approx(mean)
    assert scores(guesses, labels, 0.5)["f1"] == pytest.approx(2 * 2 / 5)  # as a task of two
