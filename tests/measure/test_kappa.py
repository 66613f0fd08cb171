"""kappa: cross-fitted, with a limit that covers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dpguard.measure import kappa
from tests import tiny
from tests.attacks.test_prior import PUBLIC


def test_it_is_what_a_guess_scores_on_text_that_it_never_saw() -> None:
    found = kappa.measure(PUBLIC, tiny.tokenizer())
    assert set(found) == set(kappa.METRICS)
    assert all(0 <= k.value <= k.upper <= 1 and k.texts == len(PUBLIC) for k in found.values())
    assert 0.4 < found["rougeL"].value < 0.9  # texts of one mould
    assert found["rouge2"].value < found["rouge1"].value
    assert found["exact_match"].value <= 2 / len(PUBLIC)


def test_text_without_a_pattern_has_a_lower_kappa() -> None:
    source = random.Random(0)
    mixed = tuple(" ".join(source.sample(tiny.WORDS, 7)) for _ in range(len(PUBLIC)))
    assert kappa.measure(mixed, tiny.tokenizer())["rougeL"].value < 0.3


def test_ten_thousand_texts_bring_the_limit_near_the_mean() -> None:
    source = random.Random(2)
    mixed = [" ".join(source.sample(tiny.WORDS, 3)) for _ in range(9_900)]
    public = tuple(source.sample([*mixed, *["the old card"] * 100], 10_000))
    found = kappa.measure(public, tiny.tokenizer())
    assert {k.texts for k in found.values()} == {10_000}
    assert found["exact_match"].value == pytest.approx(0.01, abs=0.001)
    assert all(k.value < k.upper < k.value + 0.006 for k in found.values())


def test_without_public_text_there_is_none() -> None:
    assert kappa.measure((), tiny.tokenizer()) == {}


@pytest.mark.parametrize("shape", [(0.3, 3.0), (2.0, 2.0), (0.2, 20.0)])
def test_the_limit_covers_the_mean(shape) -> None:
    source = np.random.default_rng(0)
    mean = shape[0] / sum(shape)
    covered = [kappa.upper_limit(source.beta(*shape, size=200).tolist()) >= mean for _ in range(200)]
    assert np.mean(covered) >= 0.95


def test_a_text_that_comes_often_is_guessed_as_often() -> None:
    source = random.Random(1)
    mixed = [" ".join(source.sample(tiny.WORDS, 7)) for _ in range(160)]
    public = tuple(source.sample([*mixed, *["the film is good"] * 40], 200))
    found = kappa.measure(public, tiny.tokenizer())
    assert found["exact_match"].value == pytest.approx(0.2, abs=0.01)
    assert found["rougeL"].value > 0.2
