"""One answer from several rounds of the same record."""

from __future__ import annotations

import pytest

from dpguard.engine.accounting import guarantee
from dpguard.errors import UserError
from dpguard.federation.leak import FederatedThreat, record_bound, several
from dpguard.federation.settings import Settings
from dpguard.measure.leakage import Score
from dpguard.measure.threat import Threat
from tests.federation import small

SETTINGS = Settings(clients=4, per_round=2, rounds=9, local_steps=3)


def score(guess, *, target=7, attack="span", certain=False, right=0.0):
    return Score(target, attack, {"rougeL": right}, certain, False, 0.1, 1, 1, guess)


def test_the_rounds_vote_and_the_truth_has_no_voice():
    rounds = [[score("the nurse is late", right=1.0)], [score("her card was lost")], [score("his card was lost")]]
    assert [s.guess for s in several(rounds)] == ["her card was lost"]


def test_what_is_certain_stands():
    rounds = [[score("yes")], [score("yes")], [score("no", certain=True)]]
    assert [s.guess for s in several(rounds)] == ["no"]


def test_texts_and_attacks_are_kept_apart():
    one = [score("a", target=1), score("b", target=2), score("c", target=1, attack="rows")]
    found = several([one, one[:2]])
    assert [(s.target, s.attack, s.guess) for s in found] == [(1, "span", "a"), (2, "span", "b"), (1, "rows", "c")]


def test_what_a_guarantee_says_of_several_messages():
    plan = small.plan(small.NOISED, small.model())
    told = guarantee(plan, sampling_rate=0.1, steps=27, delta=1e-5)
    words = record_bound(told, plan, SETTINGS, 4, [0.01])
    assert words.startswith("4 messages of the same record, 12 noised steps in all")
    assert f"{told.bound(0.01, 12):.3g}" in words
    bare = small.plan(small.CLIPPED, small.model())
    none = guarantee(bare, sampling_rate=0.1, steps=27, delta=1e-5)
    assert "no bound" in record_bound(none, bare, SETTINGS, 1, [0.01])


def test_a_message_of_ones_own_is_refused():
    with pytest.raises(UserError, match="a study with a federation takes it from there"):
        FederatedThreat.within(Threat(clients=3), SETTINGS)
