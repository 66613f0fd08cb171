from __future__ import annotations

from collections import Counter

import pytest

from dpguard.errors import UserError
from dpguard.federation.settings import Settings
from dpguard.federation.split import split
from tests.federation import small


def parts(how, *, clients=5, count=200, held=60, seed=0, classes=3):
    settings = Settings(clients=clients, per_round=1, rounds=1, split=how, split_seed=seed)
    return split(small.texts(count, classes=classes), small.texts(held, classes=classes, seed=1), settings)


@pytest.mark.parametrize("how", ["iid", "dirichlet(0.5)", "column(site)"])
def test_every_text_has_one_owner_and_every_client_has_texts(how):
    train, test = parts(how)
    assert sorted(i for part in train for i in part) == list(range(200))
    assert sorted(i for part in test for i in part) == list(range(60))
    assert min(len(part) for part in train) >= 1
    assert (train, test) == parts(how)
    if how != "column(site)":
        assert train != parts(how, seed=1)[0]


def skew(train, classes=3):
    """Mean share of a client's commonest label."""
    labels = [e.label for e in small.texts(200, classes=classes)]
    return sum(max(Counter(labels[i] for i in part).values()) / len(part) for part in train) / len(train)


def test_a_small_concentration_gives_every_client_few_labels():
    assert skew(parts("dirichlet(0.1)")[0]) > skew(parts("dirichlet(1)")[0]) > skew(parts("dirichlet(100)")[0])
    assert skew(parts("dirichlet(100)")[0]) < 0.45


def test_held_out_texts_follow_the_clients_own_labels():
    train, test = parts("dirichlet(0.1)", count=2000, held=1000)
    labels = [i % 3 for i in range(2000)]
    for own, held in zip(train, test, strict=True):
        for label in range(3):
            share = sum(labels[i] == label for i in own) / 2000
            assert sum(labels[i] == label for i in held) / 1000 == pytest.approx(share, abs=0.005)


def test_even_parts_differ_by_one_text_at_most():
    sizes = [len(part) for part in parts("iid", clients=7)[0]]
    assert max(sizes) - min(sizes) == 1


def test_values_of_a_column_stay_together():
    train, test = parts("column(site)", clients=3)
    owners = {}
    for client, (own, held) in enumerate(zip(train, test, strict=True)):
        for i in (*own, *held):
            assert owners.setdefault(f"site {i % 5}", client) == client
    assert len(owners) == 5


def test_splits_that_cannot_be():
    for how, more, words in (
        ("iid", {"clients": 300}, "300 is more than the 200 training texts"),
        ("column(site)", {"clients": 6}, "column 'site' has 5 values, fewer than the 6 clients"),
        ("dirichlet(0.0001)", {"clients": 50}, "leaves a client without a text"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            parts(how, **more)
        assert caught.value.loc in (("clients",), ("split",))
