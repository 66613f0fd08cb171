"""Budgets, checkpoints and ledgers: what was spent is never lost, and nothing goes on under another policy."""

from __future__ import annotations

import pytest
import torch

from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.errors import UserError
from dpguard.policy.ledger import BudgetSpent, Ledger
from tests import tiny
from tests.engine.test_opacus_traps import no_dropout, private, train_step

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]
FOLLOWS = [{"layers": "all", "clip": {"quantile": 0.5, "start": 5.0}, "noise": 1.0}]


def ledger_of(folder, budget=4.0, family="bert", **more):
    return PrivacyEngine.open_ledger(tiny.module(family), folder, client="ward 3", delta=1e-3, budget=budget, **more)


def train(engine, module, optimizer, loader, steps):
    done = 0
    while done < steps:
        for batch in loader:
            train_step(module, optimizer, batch)
            done += 1
            if done == steps:
                return


def test_training_halts_before_the_budget_and_the_model_stays_where_it_was(tmp_path):
    with ledger_of(tmp_path) as ledger:
        engine, module, optimizer, loader = private(DP, ledger=ledger)
        with pytest.raises(BudgetSpent, match="above its budget of 4"):
            train(engine, module, optimizer, loader, 10_000)
        steps = engine.steps
        assert steps == ledger.messages > 1
        assert engine.get_guarantee(1e-3).epsilon <= 4.0
        assert engine.get_guarantee(1e-3, steps=steps + 1).epsilon > 4.0
        before = module.classifier.weight.detach().clone()
        with pytest.raises(BudgetSpent):
            train(engine, module, optimizer, loader, 1)
        assert torch.equal(before, module.classifier.weight)


def test_what_was_spent_is_there_after_a_restart(tmp_path):
    with ledger_of(tmp_path) as ledger:
        train(*private(DP, ledger=ledger), steps=3)
        spent = ledger.epsilon()
    with ledger_of(tmp_path) as again:
        assert again.epsilon() == spent > 0
        train(*private(DP, ledger=again), steps=2)
        assert again.messages == 5


def test_a_checkpoint_goes_on_with_steps_and_adaptive_bounds():
    engine, module, optimizer, loader = private(FOLLOWS, batch_size=8)
    no_dropout(module)
    train(engine, module, optimizer, loader, 6)
    state = engine.state_dict()
    bound = optimizer.plan.groups["row 1"].clip
    assert bound != 5.0
    other, _module, resumed, _loader = private(FOLLOWS, batch_size=8)
    other.load_state_dict(state)
    assert other.steps == 6
    assert resumed.plan.groups["row 1"].clip == resumed.mode.plan.groups["row 1"].clip == bound
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)


def test_mistakes_on_resume_are_errors_before_any_step(tmp_path):
    engine, *_ = private(DP)
    state = engine.state_dict()
    changed, *_ = private([{"layers": "all", "clip": 1.0, "noise": 0.5}])
    with pytest.raises(UserError, match=r"the checkpoint is of plan .* expected the policy that"):
        changed.load_state_dict(state)
    slower, *_ = private(DP, batch_size=3)
    with pytest.raises(UserError, match=r"made at sampling rate 0\.2, this training's is 0\.1"):
        slower.load_state_dict(state)
    with pytest.raises(UserError, match="expected make_private to be called before"):
        PrivacyEngine().load_state_dict(state)
    with ledger_of(tmp_path, family="distilbert") as other, pytest.raises(UserError, match="the ledger is of model"):
        private(DP, ledger=other)
    with ledger_of(tmp_path / "own") as own:
        train(*private(DP, ledger=own), steps=1)
        with pytest.raises(UserError, match="the policy has changed"):
            private([{"layers": "all", "clip": 1.0, "noise": 2.0}], ledger=own)


def test_a_policy_that_can_claim_nothing_never_starts_on_a_budget():
    model = tiny.module("bert")
    ledger = Ledger("ward 3", _identity(model), delta=1e-3, budget=8.0)
    engine, module, optimizer, loader = private([{"layers": "all", "clip": 1.0}], ledger=ledger)
    with pytest.raises(BudgetSpent, match="clipped but without noise"):
        train(engine, module, optimizer, loader, 1)


def _identity(model):
    from dpguard.inputs.family import identity

    return identity(model)


def test_seeded_noise_is_said_in_the_statement():
    seeded, *rest = private(DP, seed=3)
    train(seeded, *rest, steps=1)
    entropy, *rest = private(DP, seed=None)
    train(entropy, *rest, steps=1)
    assert "subtract" in seeded.get_guarantee(1e-3).statement
    assert "subtract" not in entropy.get_guarantee(1e-3).statement
