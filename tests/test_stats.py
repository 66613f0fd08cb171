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
    assert stats.mean_interval(values, bounds=None, seed=5) != stats.mean_interval(values, bounds=None, seed=6)


def test_scores_of_one_target_under_many_seeds_are_not_many_targets():
    one = np.random.default_rng(4).random((12, 1))
    alone, repeated = stats.mean_interval(one), stats.mean_interval(np.repeat(one, 30, axis=1))
    width = alone.high - alone.low
    assert repeated.high - repeated.low == pytest.approx(width, rel=0.15)
    assert (repeated.n, repeated.seeds) == (12, 30)


@pytest.mark.parametrize(("seeds", "apart", "least"), [(2, 0.1, 0.80), (3, 0.1, 0.86), (3, 0.0, 0.92), (5, 0.05, 0.88)])
@pytest.mark.parametrize("own_targets", [False, True])
def test_few_seeds_that_differ_make_the_interval_as_wide_as_they_have_to(seeds, apart, least, own_targets):
    """Resampling a few seeds among themselves covered .65 of the true means of the first layout."""
    rng = np.random.default_rng(10)
    covered, trials, n = 0, 200, 20
    for trial in range(trials):
        shift = rng.normal(0, apart, seeds)
        if own_targets:
            values = np.full((n * seeds, seeds), np.nan)
            for seed in range(seeds):
                values[seed * n : (seed + 1) * n, seed] = 0.5 + shift[seed] + rng.normal(0, 0.1, n)
        else:
            values = 0.5 + rng.normal(0, 0.1, (n, 1)) + shift + rng.normal(0, 0.05, (n, seeds))
        got = stats.mean_interval(values, bounds=None, draws=400, seed=trial)
        covered += got.low <= 0.5 <= got.high
    assert covered >= least * trials


def test_what_two_seeds_share_leaves_their_paired_difference():
    rng = np.random.default_rng(11)
    values = rng.normal(0.5, 0.05, (30, 1)) + np.array([-0.1, 0.1])
    one, two = (stats.largest(v[None])[0] for v in (values, values - 0.05))
    less = one.minus(two)
    assert less.high - less.low < (one.interval().high - one.interval().low) / 3


def test_maximum_is_taken_inside_every_sample():
    # Ten options of pure noise with one mean: choosing the best first and then giving its interval is too low.
    values = np.random.default_rng(5).random((10, 40, 1))
    found, best = stats.largest(values)
    within = found.interval(None)
    alone = stats.mean_interval(values[best], bounds=None)
    assert within.value == alone.value == pytest.approx(values.mean(axis=(1, 2)).max())
    assert within.low > alone.low
    assert within.high >= alone.high


def test_options_without_scores_do_not_win_and_gaps_are_left_out():
    values = np.full((3, 4, 2), np.nan)
    values[1] = 0.25
    values[2, 0, 0] = 0.75
    found, best = stats.largest(values)
    assert best == 2
    assert (found.value, found.seeds) == (0.75, 1)
    with pytest.raises(ValueError, match="no score"):
        stats.largest(np.full((2, 3, 1), np.nan))


def test_paired_difference_sees_what_two_separate_intervals_cannot():
    rng = np.random.default_rng(6)
    hardness = rng.random(60)
    first, second = hardness * 0.9 + 0.05, hardness * 0.9
    assert stats.mean_interval(first).low < stats.mean_interval(second).high
    one, two = (stats.largest(values[None, :, None])[0] for values in (first, second))
    got = one.minus(two)
    assert got.value == pytest.approx(0.05)
    assert np.allclose(one.samples - two.samples, 0.05)
    assert got.n == 60


def test_what_does_not_rest_on_the_same_units_has_no_paired_difference():
    values = np.array([[[0.5], [np.nan], [0.7]], [[0.4], [0.1], [np.nan]]])
    one, two = (stats.largest(row[None], units=("a", "b", "c"))[0] for row in values)
    assert (one.units, two.units) == (("a", "c"), ("a", "b"))
    assert one.minus(two) is None


def test_a_paired_difference_covers_the_true_one():
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        hardness = rng.beta(2, 2, size=30)
        noisy = [np.clip(hardness + shift + rng.normal(0, 0.1, 30), -9, 9) for shift in (0.1, 0.0)]
        one, two = (stats.largest(values[None, :, None], draws=400, seed=trial)[0] for values in noisy)
        less = stats.Drawn(one.value - two.value, one.samples - two.samples, one.units).interval(None)
        covered += less.low <= 0.1 <= less.high
    assert 183 <= covered <= 198


def test_intervals_of_few_targets_are_as_wide_as_they_have_to_be():
    rng = np.random.default_rng(9)
    covered = 0
    for trial in range(300):
        got = stats.largest(rng.normal(0.5, 0.1, (1, 8, 1)), draws=400, seed=trial)[0].interval(None)
        covered += got.low <= 0.5 <= got.high
    assert covered >= 276  # 92 %; a percentile interval without Student's t reaches about 88


def test_texts_of_one_message_are_resampled_together():
    rng = np.random.default_rng(10)
    covered = {"messages": 0, "texts": 0}
    for trial in range(200):
        level = rng.beta(2, 2, size=15)
        texts = np.repeat(level, 4) + rng.normal(0, 0.02, 60)
        sums, counts = texts.reshape(15, 4).sum(axis=1)[None, :, None], np.full((1, 15, 1), 4.0)
        for name, found in (
            ("messages", stats.largest(sums, counts, draws=400, seed=trial)[0]),
            ("texts", stats.largest(texts[None, :, None], draws=400, seed=trial)[0]),
        ):
            assert found.value == pytest.approx(texts.mean())
            got = found.interval(None)
            covered[name] += got.low <= 0.5 <= got.high
    assert covered["messages"] >= 182
    assert covered["texts"] < 160


def test_a_lower_limit_holds_as_often_as_it_says():
    rng = np.random.default_rng(11)
    wrong = sum(stats.lower_limit(float(rng.beta(0.3, 0.7, 20).mean()), 20, 0.05) > 0.3 for _ in range(2000))
    assert wrong <= 100
    assert stats.lower_limit(0.5, 100, 0.05) > 0.35


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_interval_stays_in_bounds_around_its_value(values):
    got = stats.mean_interval(values, draws=200)
    assert 0 <= got.low <= got.value + 1e-12
    assert got.value - 1e-12 <= got.high <= 1
