"""Parts of a study: whole chains, dealt alike everywhere, and together the study."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.shards import Shard, split

FEDERATED = """\
name: fed
model: demo
data: demo
policies:
  dp-sgd: {sweep: {noise: [0.3, 0.6]}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
federation: {clients: 4, per_round: 2, rounds: 3, observe: [1, 2]}
leakage: {targets: 3, at: [start, rounds, end], seeds: [0, 1, 7]}
utility: {seeds: [0, 1]}
"""


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize("kind", ["central", "federated", "tuned"])
def test_shards_are_the_study_each_cell_once_and_chains_whole(kit, count, kind):
    tuned = kit.text.replace("at: [start, end]", "at: [start, tuned, end]")
    cells = kit.cells({"central": kit.text, "federated": FEDERATED, "tuned": tuned}[kind])
    parts = [Shard(index, count).cells(cells) for index in range(count)]
    assert Counter(cell.id for part in parts for cell in part) == Counter(cell.id for cell in cells)
    order = {cell.id: place for place, cell in enumerate(cells)}
    for part in parts:
        ids = {cell.id for cell in part}
        assert all(cell.settings.get(NEEDS, cell.id) in ids for cell in part if cell.settings.get("at") != "tuned")
        assert [order[cell.id] for cell in part] == sorted(order[cell.id] for cell in part)


def test_shards_are_balanced_leg_by_leg(kit):
    cells = kit.cells()
    for count in (2, 3, 4):
        parts = [Counter(cell.leg for cell in Shard(index, count).cells(cells)) for index in range(count)]
        for leg in ("guarantee", "leakage", "utility"):
            numbers = [part[leg] for part in parts]
            assert max(numbers) - min(numbers) <= 2, (count, leg, numbers)


@st.composite
def chains(draw):
    sizes = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), max_size=40))
    return [(f"{kind}{size}", [f"{number}-{i}" for i in range(size)]) for number, (kind, size) in enumerate(sizes)]


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(1, 9))
def test_dealing_is_a_fair_partition(given_chains, count):
    order = [cell for _, ids in given_chains for cell in ids]
    parts = split(order, given_chains, count)
    assert parts == split(order, given_chains, count)
    assert sorted(cell for part in parts for cell in part) == sorted(order)
    for kind in {kind for kind, _ in given_chains}:
        own = [ids for other, ids in given_chains if other == kind]
        dealt = [sum(set(ids) <= set(part) for ids in own) for part in parts]
        assert sum(dealt) == len(own), "no chain is torn"
        assert max(dealt) - min(dealt) <= 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3/3", "--shard is '3/3', which is out of range, expected 0/3 to 2/3 (counted from 0)"),
        ("0/0", "--shard is '0/0', which is out of range, expected at least one shard, such as 0/1 (counted from 0)"),
        ("-1/3", "--shard is '-1/3', expected i/n such as 0/3"),
        ("1", "--shard is '1', expected i/n such as 0/3"),
        ("a/b", "--shard is 'a/b', expected i/n such as 0/3"),
    ],
)
def test_a_shard_that_cannot_be_meant(text, sentence):
    with pytest.raises(UserError) as error:
        Shard.parse(text)
    assert str(error.value) == sentence
