"""The bigram model is a probability distribution and prefers the order it has seen."""

from __future__ import annotations

import math

import pytest
import torch

from dpguard.attacks.language import LIMIT, Bigram, Corpus, bigram, public_lengths
from dpguard.attacks.observation import Disclosed
from dpguard.policy.table import Plan
from tests import tiny


def test_probabilities_after_any_token_sum_to_one() -> None:
    model = Bigram([[2, 5, 6, 3], [2, 5, 7, 3]], vocabulary=9)
    for first in range(9):
        rows = torch.tensor([[first, second] for second in range(9)])
        assert float((-model.loss(rows, torch.ones_like(rows))).exp().sum()) == pytest.approx(1)


def test_by_hand() -> None:
    model = Bigram([[0, 1, 0, 1]], vocabulary=2, strength=1.0)
    p1 = (2 + 1) / (4 + 2)
    wanted = -math.log((2 + 1.0 * p1) / (2 + 1.0))
    assert float(model.loss(torch.tensor([[0, 1]]), torch.ones(1, 2))) == pytest.approx(wanted)


def test_padding_does_not_count_and_the_seen_order_is_likelier() -> None:
    corpus = Corpus(tiny.SENTENCES * 3, tiny.tokenizer())
    model = bigram(corpus, 80)
    assert model is not None
    ids = torch.tensor([tiny.tokenizer()(tiny.SENTENCES[0])["input_ids"]])
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = (padded != 0).long()
    assert torch.equal(model.loss(ids, torch.ones_like(ids)), model.loss(padded, mask))
    assert model.loss(ids, torch.ones_like(ids)) < model.loss(ids.flip(1), torch.ones_like(ids))


def test_a_large_public_set_is_thinned_evenly_and_lengths_count_special_tokens() -> None:
    texts = tuple("card lost" for _ in range(3 * LIMIT))
    corpus = Corpus.of(Disclosed(tiny.tokenizer(), Plan({}, ()), 1, public_texts=texts))
    assert len(corpus.texts) == LIMIT
    assert set(public_lengths(corpus)) == {4}
    assert bigram(Corpus((), tiny.tokenizer()), 10) is None
