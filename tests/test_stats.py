"""Intervals against known values, closed forms and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpguard import stats


def test_binomial_is_clopper_pearson():
    # 8 of 10 and 0 of 20: textbook values (Clopper and Pearson 1934; R's binom.test).
    eight = stats.binomial(8, 10)
    assert (eight.low, eight.high) == pytest.approx((0.4439045, 0.9747893), abs=1e-6)
    assert stats.binomial(0, 20).high == pytest.approx(0.1684335, abs=1e-6)
    assert stats.binomial(20, 20).high == 1.0


def test_equal_scores_get_the_exact_interval_not_certainty():
    for n in (3, 10, 50):
        zeros, ones = stats.mean_interval(np.zeros(n)), stats.mean_interval(np.ones(n))
        assert (zeros.low, zeros.high) == pytest.approx((0.0, stats.binomial(0, n).high))
        assert (ones.low, ones.high) == pytest.approx((stats.binomial(n, n).low, 1.0))


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    values = np.random.default_rng(1).beta(2, 3, size=400)
    got = stats.mean_interval(values, draws=8000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.003)
    assert got.high == pytest.approx(values.mean() + half, abs=0.003)


def test_interval_covers_the_true_mean():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        got = stats.mean_interval(rng.beta(0.4, 3.0, size=30), draws=400, seed=trial)
        covered += got.low <= 0.4 / 3.4 <= got.high
    assert covered >= 180


def test_same_seed_same_interval_and_another_seed_another():
    values = np.random.default_rng(3).random((20, 3))
    assert stats.mean_interval(values, seed=5) == stats.mean_interval(values, seed=5)
    assert stats.mean_interval(values, seed=5) != stats.mean_interval(values, seed=6)


def test_scores_of_one_target_under_many_seeds_are_not_many_targets():
    one = np.random.default_rng(4).random((12, 1))
    alone, repeated = stats.mean_interval(one), stats.mean_interval(np.repeat(one, 30, axis=1))
    width = alone.high - alone.low
    assert repeated.high - repeated.low == pytest.approx(width, rel=0.15)
    assert (repeated.n, repeated.seeds) == (12, 30)


def test_maximum_is_taken_inside_every_sample():
    # Ten options of pure noise with one mean: choosing the best first and then giving its interval is too low.
    values = np.random.default_rng(5).random((10, 40, 1))
    within, best = stats.max_interval(values, bounds=None)
    alone = stats.mean_interval(values[best], bounds=None)
    assert within.value == alone.value == pytest.approx(values.mean(axis=(1, 2)).max())
    assert within.low > alone.low
    assert within.high >= alone.high


def test_options_without_scores_do_not_win_and_gaps_are_left_out():
    values = np.full((3, 4, 2), np.nan)
    values[1] = 0.25
    values[2, 0, 0] = 0.75
    interval, best = stats.max_interval(values)
    assert best == 2
    assert (interval.value, interval.n, interval.seeds) == (0.75, 1, 1)
    with pytest.raises(ValueError, match="no score"):
        stats.max_interval(np.full((2, 3, 1), np.nan))


def test_paired_difference_sees_what_two_separate_intervals_cannot():
    rng = np.random.default_rng(6)
    hardness = rng.random(60)
    first, second = hardness * 0.9 + 0.05, hardness * 0.9
    assert stats.mean_interval(first).low < stats.mean_interval(second).high
    got = stats.paired_difference(first, second, bounds=None)
    assert got.value == pytest.approx(0.05)
    assert got.low == pytest.approx(0.05)
    with pytest.raises(ValueError, match="shapes"):
        stats.paired_difference([1.0, 2.0], [1.0])


def test_paired_difference_ignores_targets_that_only_one_has():
    got = stats.paired_difference([0.5, np.nan, 0.7], [0.4, 0.1, np.nan])
    assert (got.value, got.n) == (pytest.approx(0.1), 1)


def test_metrics_from_confusion_counts():
    table = [[50, 10], [5, 35]]
    assert float(stats.from_confusion(table, "accuracy")) == pytest.approx(0.85)
    assert float(stats.from_confusion(table, "f1")) == pytest.approx(2 * 35 / (40 + 45))
    expected = (35 * 50 - 10 * 5) / np.sqrt(45.0 * 40 * 60 * 55)
    assert float(stats.from_confusion(table, "mcc")) == pytest.approx(expected)
    assert float(stats.from_confusion([[10, 0], [10, 0]], "mcc")) == 0.0
    with pytest.raises(ValueError, match="expected one of"):
        stats.from_confusion(table, "auc")


def test_utility_interval_is_the_bootstrap_over_examples():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, size=500)
    guesses = np.where(rng.random(500) < 0.8, labels, 1 - labels)
    got = stats.utility_interval([guesses.tolist()], labels.tolist(), draws=8000)
    accuracy = float((guesses == labels).mean())
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 500)
    assert got.value == pytest.approx(accuracy)
    assert got.low == pytest.approx(accuracy - half, abs=0.005)
    assert got.high == pytest.approx(accuracy + half, abs=0.005)
    assert (got.n, got.seeds) == (500, 1)


def test_utility_interval_widens_with_differences_between_seeds():
    labels = [0, 1] * 200
    good, poor = labels, [0] * 400
    together = stats.utility_interval([good, poor, good], labels)
    assert together.value == pytest.approx((1 + 0.5 + 1) / 3)
    assert together.low < 0.7
    assert together.high > 0.99


@pytest.mark.parametrize("metric", stats.UTILITY_METRICS)
def test_utility_interval_holds_its_value_for_every_metric(metric):
    labels = [0, 1, 2, 1, 0, 2, 1, 1]
    interval = stats.utility_interval([[0, 1, 2, 2, 0, 1, 1, 0], labels], labels, metric)
    assert interval.low <= interval.value <= interval.high
    assert interval.value < 1


def test_utility_interval_refuses_what_cannot_be_judged():
    with pytest.raises(ValueError, match="expected"):
        stats.utility_interval([[0, 1]], [0, 1, 1])
    with pytest.raises(ValueError, match="expected"):
        stats.utility_interval([], [0])
    assert stats.utility_interval([[0, 0]], [0, 0]).value == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_interval_stays_in_bounds_around_its_value(values):
    got = stats.mean_interval(values, draws=200)
    assert 0 <= got.low <= got.value + 1e-12
    assert got.value - 1e-12 <= got.high <= 1
