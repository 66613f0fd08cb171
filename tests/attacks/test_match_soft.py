"""Soft spans of damaged gradients, dropped entries, the discrete search and its proof."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dpguard.attacks import likelihood_texts, match, match_proof
from dpguard.attacks.base import Budget
from dpguard.attacks.match_polish import Polish
from dpguard.attacks.match_proof import is_message
from dpguard.attacks.match_soft import directions, kept_entries, likely
from dpguard.attacks.objective import Objective, targets, telling
from dpguard.attacks.span_sites import left_as_found
from dpguard.engine.client import Client
from dpguard.engine.gradients import running_as
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.measure.leakage import observation
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from tests import messages, tiny

PUBLIC = ("the patient asked for help", "please call her soon about the new card today", "the test is late")
ONE = tiny.SENTENCES[0]
DAMAGED = [[{"layers": "all", "keep": 0.1}], [{"layers": "all", "bits": 4}], [{"layers": "all", "bits": 1}]]


def _found(seen, *, preset="default", budget=None):
    return match.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0), preset=preset, budget=budget)


def test_directions_stand_out_of_an_error_and_pure_error_has_none() -> None:
    source = torch.Generator().manual_seed(0)
    states = torch.randn(4, 96, generator=source, dtype=torch.float64)
    signal = torch.randn(96, 4, generator=source, dtype=torch.float64) @ states
    error = 0.3 * torch.randn(96, 96, generator=source, dtype=torch.float64)
    found = directions([signal + error])
    assert found is not None
    assert found.visible == 4
    others = torch.randn(4, 96, generator=source, dtype=torch.float64)
    assert float(found.outside(states).max()) < 0.1 < 0.7 < float(found.outside(others).min())
    assert directions([error]) is None
    assert directions([torch.zeros(96, 96, dtype=torch.float64)]) is None
    exact = directions([signal])
    assert exact is not None
    assert exact.visible == 4
    assert float(exact.outside(states).max()) < 1e-6


def test_dropped_entries_are_found_together_with_the_state() -> None:
    source = torch.Generator().manual_seed(1)
    states = torch.randn(6, 200, generator=source, dtype=torch.float64)
    dropped = states * (torch.rand(6, 200, generator=source) > 0.1) / 0.9
    basis = torch.linalg.svd(dropped, full_matrices=False)[2]
    assert float(kept_entries(states, basis, 0.1).max()) < 1e-6
    others = torch.randn(50, 200, generator=source, dtype=torch.float64)
    assert float(kept_entries(others, basis, 0.1).min()) > 0.05


@pytest.mark.parametrize("rows", DAMAGED)
def test_a_damaged_message_gives_its_text_and_is_proven(rows) -> None:
    seen, batch = messages.observe(tiny.loaded("bert"), rows, [ONE], [1], tell=(), public=PUBLIC)
    found = _found(seen)
    assert found.sequences == [batch.input_ids[0].tolist()]
    assert found.certain == [True]
    assert found.notes["labels"] == [1]
    assert found.candidates <= match.PLUGIN.presets["default"].candidates


def test_dropout_hides_neither_tokens_nor_length_and_is_never_certain() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [{"layers": "embeddings", "share": False}], [ONE], [1], tell=())
    plan = seen.disclosed.plan
    rates = [module for module in model.module.modules() if isinstance(module, torch.nn.Dropout)]
    before = [module.p for module in rates]
    try:
        for module in rates:
            module.p = 0.1
        update = Client(model.module, plan, seed=0, mode="train", dropout_seed=3).observe(batch)
        seen = replace(seen, message=update.tensors, disclosed=replace(seen.disclosed, mode="train"))
        found = _found(seen, budget=Budget(0, 200))
    finally:
        for module, rate in zip(rates, before, strict=True):
            module.p = rate
    # the rates are evidence: the attack itself runs with dropout off, and once lost them that way
    assert found.sequences == [batch.input_ids[0].tolist()]
    assert found.notes["likely_lengths"] == [batch.input_ids.shape[1]]
    assert found.certain == [False]


@pytest.mark.parametrize("rows", [[], *DAMAGED])
def test_only_the_true_text_and_label_are_proven(rows) -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, rows, [ONE], [1])
    true = batch.input_ids[0].tolist()
    swapped = [true[0], true[2], true[1], *true[3:]]
    with running_as(model.module, "eval"):
        assert is_message(seen, true, 1)
        assert likelihood_texts.is_message(seen, true, 1)
        assert not is_message(seen, true, 0)
        assert not is_message(seen, swapped, 1)
        assert not is_message(messages.shuffled(seen), true, 1)
        for disclosed in (replace(seen.disclosed, mode="train"), replace(seen.disclosed, kind="delta")):
            assert not is_message(replace(seen, disclosed=disclosed), true, 1)
        noisy, _ = messages.observe(model, [{"layers": "all", "clip": 1.0, "noise": 1e-3}], [ONE], [1])
        assert not is_message(noisy, true, 1)


def test_a_text_whose_neighbours_send_its_message_too_is_not_proven() -> None:
    """As the library draws them, weights let a head's gradient barely depend on one word among many."""
    model = tiny.loaded("bert", labels=20)
    for name, parameter in model.module.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data.div_(3.0)
    draws = random.Random(0)
    text = " ".join(draws.choice(tiny.WORDS) for _ in range(40))
    rows = [{"layers": "all", "share": False}, {"layers": "head", "share": True}]
    seen, batch = messages.observe(model, rows, [text], [1])
    true = batch.input_ids[0].tolist()
    near = match_proof.neighbours(seen, true)
    assert 0 < len(near) <= 48
    assert true not in near
    with running_as(model.module, "eval"):
        alone = [row for row in (true, *near) if match_proof._sends(seen, row, 1, match_proof.TOLERANCE)]
        assert true in alone
        assert len(alone) > 1
        assert not any(is_message(seen, row, 1) for row in alone[:2])
    assert not likelihood_texts.is_message(seen, true, 1)


@pytest.mark.parametrize("damage", [messages.shuffled, messages.noise])
def test_messages_that_hold_no_text_prove_nothing(damage) -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [{"layers": "all", "bits": 4}], [ONE], [1], tell=())
    assert _found(damage(seen), budget=Budget(2, 150)).certain == [False]


def test_lists_name_the_length_and_nothing_where_only_the_head_is_shared() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [], [ONE], [1], tell=())
    with left_as_found(model.module):
        lists = likely(seen)
        assert lists is not None
        assert lists.lengths[0] == batch.input_ids.shape[1]
        head = {n: v for n, v in seen.message.items() if seen.disclosed.plan[n].slot.role == "head"}
        assert likely(replace(seen, message=head)) is None


def test_deltas_are_read_as_one_step_against_the_gradient() -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, [], [ONE], [1])
    moved = {name: -0.05 * value for name, value in seen.message.items()}
    delta = replace(seen, message=moved, disclosed=replace(seen.disclosed, kind="delta", learning_rate=0.05))
    assert match.PLUGIN.applicable(delta) == ""
    found = _found(delta)
    assert found.sequences == [batch.input_ids[0].tolist()]
    assert found.certain == [False]
    assert "one step" in found.notes["kind"]
    noisy, _ = messages.observe(model, [{"layers": "all", "clip": 1.0, "noise": 0.1}], [ONE], [1])
    noisy = replace(noisy, disclosed=replace(noisy.disclosed, kind="delta"))
    assert "noisy" in match.PLUGIN.applicable(noisy)


def test_the_change_of_weights_after_real_local_steps_gives_the_text() -> None:
    model = tiny.loaded("bert")
    plan = Policy([]).plan(slots(model.module))
    batch = collate([ONE], [1], model.tokenizer)
    update = Threat(local_steps=4).message(model, plan, [batch], noise_seed=1)
    seen = observation(model, plan, update, sequences=1)
    assert (seen.disclosed.kind, seen.disclosed.local_steps) == ("delta", 4)
    found = _found(seen)
    assert found.sequences == [batch.input_ids[0].tolist()]
    assert found.certain == [False]


@pytest.mark.parametrize("rows", [[{"layers": "all", "keep": 0.1}], [{"layers": "all", "bits": 1}]])
def test_a_few_pruned_or_rounded_matrices_are_spread_over_the_blocks(rows) -> None:
    model = tiny.loaded("bert")
    seen, batch = messages.observe(model, rows, [ONE], [1])
    damaged = targets(seen, aware=True)[0]
    kept = [target.tap.slot for target in telling(damaged, 3)]
    assert [(slot.role, slot.block) for slot in kept] == [("value", 0), ("value", 1), ("value", 2)]
    clean = targets(messages.observe(model, [], [ONE], [1])[0], aware=True)[0]
    assert telling(clean, 3) == clean
    objective = Objective(seen, 1, aware=True, few=3)
    wrong = batch.input_ids[:, [0, 2, 1, *range(3, batch.input_ids.shape[1])]]
    table = model.module.get_input_embeddings().weight
    with running_as(model.module, "eval"):
        near, far = (float(objective(batch, table[ids])) for ids in (batch.input_ids, wrong))
    assert near == pytest.approx(0, abs=2e-5)
    assert far > 1e-4


def _polish(seen, lengths, limit=4000):
    lists = likely(seen)
    assert lists is not None
    return Polish(seen, replace(lists, lengths=lengths), [0, 1], limit, random.Random(0))


def test_a_wrong_length_at_the_top_of_the_list_is_left_again() -> None:
    seen, batch = messages.observe(tiny.loaded("bert"), [{"layers": "all", "keep": 0.1}], [ONE], [1], tell=())
    true = batch.input_ids[0].tolist()
    with running_as(seen.model, "eval"):
        polish = _polish(seen, (len(true) + 4, len(true) + 6, len(true) - 2))
        label, row = polish.run()
    assert (label, list(row), polish.certain) == (1, true, True)
    assert len(polish.pool) < 4000


def test_the_slope_of_the_distance_points_to_the_word_that_is_missing() -> None:
    seen, batch = messages.observe(tiny.loaded("bert"), [], [ONE], [1], tell=())
    true = batch.input_ids[0].tolist()
    with running_as(seen.model, "eval"):
        polish = _polish(seen, (len(true),))
        guess = polish.lists.upto(len(true))
        blank = replace(guess, misfit=torch.zeros_like(guess.misfit))
        ranks = []
        for place in range(1, len(true) - 1):
            wrong = (*true[:place], 60 + place % 4, *true[place + 1 :])
            listed = polish.pointed((1, wrong), blank, len(blank.tokens))[place].tolist()
            ranks.append(listed.index(true[place]))
    assert sum(ranks) / len(ranks) < 0.25 * len(blank.tokens)


@pytest.mark.parametrize(("distance", "absolute"), [("l2", False), ("l1", True)])
def test_published_distances_are_those_of_gradients_written_out(distance, absolute) -> None:
    model = tiny.loaded("bert")
    seen, _ = messages.observe(model, [], [ONE], [1])
    other, batch = messages.observe(model, [], [tiny.SENTENCES[1]], [0])
    objective = Objective(seen, 1, aware=False, distance=distance)
    embeddings = model.module.get_input_embeddings().weight[batch.input_ids]
    with running_as(model.module, "eval"):
        found = float(objective(batch, embeddings))
    gaps = [other.message[t.tap.slot.name] - t.value for t in objective.targets]
    wanted = sum(float(g.pow(2).sum()) + absolute * 0.01 * float(g.abs().sum()) for g in gaps)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_the_published_presets_are_plain_gradient_matching_and_run() -> None:
    for name, distance, starts in (("dlg", "l2", 1), ("tag", "l1", 1), ("lamp", "cosine", 500)):
        setting, budget = match.SETTINGS[name], match.PLUGIN.presets[name]
        assert (setting.distance, setting.starts, setting.aware, setting.soft) == (distance, starts, False, False)
        assert (setting.learning_rate, setting.decay, setting.decay_every, budget.steps) == (0.01, 0.89, 50, 2000)
    seen, _ = messages.observe(tiny.loaded("bert"), [], [ONE], [1])
    for name in ("dlg", "tag", "lamp"):
        short = _found(seen, preset=name, budget=Budget(2, 60))
        assert short.steps == 2
        assert short.certain == [False]
