"""The population search: children are texts of the same length, selection keeps it diverse, and it ends when told."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dpguard.attacks import panel
from dpguard.attacks.base import Budget
from dpguard.attacks.likelihood_breed import OPERATORS, Stock
from dpguard.attacks.likelihood_evolve import Evolution
from dpguard.attacks.likelihood_guide import Guide
from dpguard.attacks.likelihood_prior import Neighbours
from dpguard.attacks.likelihood_replay import Replay
from dpguard.attacks.likelihood_search import Search
from dpguard.attacks.likelihood_setting import Spent
from dpguard.attacks.observation import Reconstruction
from tests import messages, tiny

QUIET = [{"layers": "all", "clip": 0.1, "noise": 0.002}]
PUBLIC = (
    *tiny.SENTENCES[1:],
    "the doctor asked about his new card",
    "no money was sent today",
    "thank you for help with her left leg",
    "the ward is not ready yet",
)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_child_has_its_parents_length_and_words_that_somebody_offered(name: str, size: int) -> None:
    body, mate, stranger = tuple(range(size)), tuple(range(10, 10 + size)), (20, 21, 22)
    stock = Stock(random.Random(0), lambda text, place: 30, lambda token: 40 + token, [mate], [stranger])
    children = {OPERATORS[name][0](body, stock) for _ in range(200)}
    assert {len(child) for child in children} == {size}
    offered = {*body, *mate, *stranger, 30, *(40 + token for token in body)}
    assert offered >= {token for child in children for token in child}
    if name in {"swap", "move"}:
        assert all(sorted(child) == list(body) for child in children)
        assert len(children) > (1 if size > 1 else 0)
    elif size > 1 or name != "transplant":
        assert children - {body}  # it does change something


def _evolution(budget: int = 4000, seed: int = 0) -> tuple[Evolution, tuple[int, ...], int]:
    seen, batch = messages.observe(tiny.loaded("bert"), QUIET, [tiny.SENTENCES[0]], (1,), public=PUBLIC)
    words = Neighbours(seen.disclosed, seen.model.config.vocab_size, 512)
    true = tuple(batch.input_ids[0].tolist())
    guide = Guide(Replay(seen), 1, 0, words.rows)
    search = Search(guide, words, len(true), torch.Generator().manual_seed(seed), random.Random(seed), Spent(budget))
    search.start([row for row in words.rows if len(row) == len(true)])
    return Evolution(search), true, int(guide.table.shape[0])


def test_it_finds_a_text_as_likely_as_the_truth_with_the_same_words() -> None:
    evolution, true, _ = _evolution(5000)
    search = evolution.search
    assert true not in search.pool
    evolution.run(5000)
    best = max(search.pool, key=search.pool.__getitem__)
    assert search.pool[best] >= search.guide.full([true])[0]
    assert sorted(best) == sorted(true)  # this model hardly sees orders
    assert evolution.explained()


def test_it_ends_with_budget_left_once_the_noise_explains_what_is_left_over() -> None:
    evolution, true, _ = _evolution(9000)
    search = evolution.search
    search.setting = replace(search.setting, patience=1)
    search.score([true])
    evolution.live.add(true)
    evolution.run(9000)
    assert evolution.explained()
    assert not search.spent.over


def test_the_noise_explains_the_truth_and_no_text_one_word_from_it() -> None:
    evolution, true, vocabulary = _evolution()
    guide = evolution.search.guide
    assert guide.explains(true)
    others = [(*true[:2], token, *true[3:]) for token in range(5, vocabulary) if token != true[2]]
    assert sum(guide.explains(row) for row in others) <= len(others) // 10


def test_a_population_is_not_one_text_in_many_forms() -> None:
    evolution, true, vocabulary = _evolution()
    search = evolution.search
    near = [(*true[:2], token, *true[3:]) for token in range(5, vocabulary)]
    search.score(near)
    evolution.live = set(search.pool)
    chosen = evolution.select(search.guide.nats)
    assert chosen[0] == max(search.pool, key=lambda row: evolution.fitness(row, search.guide.nats))
    beside = [sum(a != b for a, b in zip(row, true, strict=True)) < 2 for row in chosen]
    assert sum(beside) <= search.setting.crowd + 1
    assert len(chosen) > sum(beside)


def test_a_stuck_population_starts_elsewhere_and_keeps_what_it_had() -> None:
    evolution, _, _ = _evolution()
    before = dict(evolution.search.pool)
    evolution.search.setting = replace(evolution.search.setting, patience=-1, telling=torch.inf)
    evolution.run(2000)
    assert before.items() <= evolution.search.pool.items()
    assert evolution.search.spent.candidates >= 2000  # stuck at every turn, it never gives up


def test_what_cheaper_attacks_proposed_is_where_it_starts() -> None:
    seen, batch = messages.observe(tiny.loaded("bert"), QUIET, [tiny.SENTENCES[0]], (1,), public=PUBLIC)
    true = batch.input_ids[0].tolist()
    budget = Budget(0, 30)
    assert panel.attack("likelihood").reconstruct(seen, seed=0, budget=budget).sequences != [true]
    for ids in (true, true[1:-1], [*true, 0]):
        told = replace(seen, earlier=(("span", Reconstruction([ids], [False])),))
        assert panel.attack("likelihood").reconstruct(told, seed=0, budget=budget).sequences == [true]


def test_texts_are_kept_further_apart_at_first() -> None:
    evolution, true, _ = _evolution(6000)
    search, size = evolution.search, len(true) - 2
    rows = [(*true[: i + 1], *other, *true[i + 3 :]) for i in range(size - 1) for other in ((5, 6), (6, 5), (7, 7))]
    search.score(rows)
    evolution.live, found = set(rows), []
    for apart in (4.0, 2.0):
        evolution.radius = lambda apart=apart: apart  # type: ignore[method-assign]
        found.append(len(evolution.select(0.0)))
        evolution.live = set(rows)
    assert found[0] < found[1]
    evolution, _, _ = _evolution(6000)
    evolution.search.places, radii = range(1, 19), []
    for spent in range(evolution.first, 6000, 1000):
        evolution.search.spent.candidates = spent
        radii.append(evolution.radius())
    assert radii == sorted(radii, reverse=True)
    assert (radii[0], radii[-1]) == (6, 2)
