"""Matching recovers a text from a clean message, and says less under noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import match
from dpguard.attacks.base import Budget
from dpguard.errors import UserError
from tests import messages, tiny

PUBLIC = ("the patient asked for help", "please call her soon about the new card today", "the test is late")
ONE = tiny.SENTENCES[0]


def _run(seen, *, preset="demo", budget=None, seed=0):
    return match.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(seed), preset=preset, budget=budget)


def _bag(model, ids):
    return sorted(messages.contents(model, ids))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_sentence_is_recovered_from_a_clean_message(family) -> None:
    model = tiny.loaded(family)
    seen, batch = messages.observe(model, [], [ONE], [1], public=PUBLIC)
    found = _run(seen, preset="default", budget=Budget(120, 1500, 2))
    assert found.sequences == [batch.input_ids[0].tolist()]
    assert found.certain == [True]
    assert found.notes["loss"] < 1e-5


def test_the_demo_budget_puts_most_tokens_of_a_small_encoders_text_in_place() -> None:
    right = []
    for index, text in enumerate(tiny.SENTENCES):
        seen, batch = messages.observe(tiny.loaded("bert"), [], [text], [index % 2], public=PUBLIC)
        wanted = batch.input_ids[0].tolist()
        right += [a == b for a, b in zip(_run(seen).sequences[0], wanted, strict=True)]
    assert sum(right) / len(right) > 0.7


def test_a_batch_of_two_is_recovered_through_its_clip() -> None:
    model = tiny.loaded("bert")
    rows = [{"layers": "all", "clip": 0.1, "per": "block"}]
    seen, batch = messages.observe(model, rows, tiny.SENTENCES[:2], [1, 0], public=PUBLIC)
    found = _run(seen, preset="default", budget=Budget(150, 1500, 2))
    true = [messages.contents(model, row) for row in batch.input_ids.tolist()]
    assert [messages.contents(model, ids) for ids in found.sequences] == true


def test_labels_and_lengths_need_not_be_known() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [], [ONE], [1], tell=(), public=(*PUBLIC, "is the test result not late yet"))
    found = _run(seen, preset="default", budget=Budget(80, 800, 2))
    assert found.notes["labels"] == [1]
    assert len(found.sequences[0]) == found.notes["lengths"][0]
    true, guess = set(batch.input_ids[0].tolist()), set(found.sequences[0])
    assert len(true & guess) >= 0.7 * len(true)


def test_partial_searches_orders_with_the_papers_rhythm() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [], [ONE], [1], public=PUBLIC)
    found = _run(seen, preset="partial", budget=Budget(steps=160, candidates=1000))
    assert found.steps == 160
    assert found.candidates <= 1000
    assert len(set(_bag(model, found.sequences[0])) & set(_bag(model, batch.input_ids[0].tolist()))) >= 5
    starting = _run(
        seen, preset="partial", budget=Budget(steps=0, candidates=match.PLUGIN.presets["partial"].candidates)
    )
    assert starting.candidates == 500 + 500 + 1
    setting = match.SETTINGS["partial"]
    assert (setting.learning_rate, setting.decay, setting.decay_every) == (0.01, 0.89, 50)
    assert (setting.starts, setting.permutations, setting.proposals, setting.every) == (500, 500, 200, 75)
    assert not setting.aware


def test_pruned_and_rounded_gradients_still_give_the_text_away() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [{"layers": "all", "keep": 0.1, "bits": 4}], [ONE], [1], public=PUBLIC)
    found = _run(seen, preset="default", budget=Budget(120, 1500, 2))
    assert found.sequences == [batch.input_ids[0].tolist()]


def test_under_heavy_noise_it_finds_nothing_like_the_text() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [{"layers": "all", "clip": 0.1, "noise": 5.0}], [ONE], [1], public=PUBLIC)
    found = _run(seen)
    assert found.notes["objective"] == "whitened"
    assert found.sequences != [batch.input_ids[0].tolist()]


def test_the_budget_is_kept() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:2], [1, 0], tell=(), public=PUBLIC)
    for budget in (Budget(0, 10, 1), Budget(3, 40, 2), Budget(30, 100, 3)):
        found = _run(seen, budget=budget)
        assert found.steps <= budget.steps
        # every label guess gets its restarts, whatever the budget says
        assert found.candidates <= max(budget.candidates, 8 * budget.restarts) + 8 * budget.restarts


def test_projection_never_gives_special_or_unnamed_tokens() -> None:
    model = tiny.loaded("bert")
    seen, _ = messages.observe(model, [], [ONE], [1], public=PUBLIC)
    ids = _run(messages.noise(seen), budget=Budget(2, 10, 1)).sequences[0]
    assert (ids[0], ids[-1]) == (model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)
    assert not set(ids[1:-1]) & set(model.tokenizer.all_special_ids)


def test_reasons_not_to_run() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], [ONE], [1])
    name = "bert.embeddings.word_embeddings.weight"
    assert "token-embedding" in match.PLUGIN.applicable(replace(seen, message={name: seen.message[name]}))
    update = replace(seen, disclosed=replace(seen.disclosed, kind="update"))
    assert "update" in match.PLUGIN.applicable(update)
    language_model = replace(seen, model=tiny.module("gpt2-lm"))
    assert "predicts tokens" in match.PLUGIN.capability.reason(language_model)
    assert match.PLUGIN.applicable(seen) == ""


def test_an_unknown_preset_names_the_nearest() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], [ONE], [1])
    with pytest.raises(UserError, match="did you mean 'partial'"):
        _run(seen, preset="partail")
