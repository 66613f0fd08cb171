"""What a training loop could do wrong: each would make the stated epsilon false, and is refused or counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import dpguard
from dpguard.engine import noise
from dpguard.engine.client import Client
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy import gaussian
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_opacus_traps import EXAMPLES, collator, no_dropout, private, train_step

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]


def test_a_pass_that_is_left_early_counts_as_a_whole_one():
    engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False)
    for _ in range(5):
        for batch in loader:
            train_step(module, optimizer, batch)
            break
    assert engine.steps == 5
    assert engine.get_epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(math.sqrt(5), 1e-5))
    whole, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False)
    for batch in loader:
        train_step(module, optimizer, batch)
    assert whole.get_epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(1.0, 1e-5))


def test_passes_are_entered_in_the_ledger_one_by_one(tmp_path):
    with PrivacyEngine.open_ledger(tiny.module("bert"), tmp_path, client="ward", delta=1e-5) as ledger:
        _engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False, ledger=ledger)
        for _ in range(3):
            train_step(module, optimizer, next(iter(loader)))
        assert ledger.epsilon() == pytest.approx(gaussian.epsilon_of(math.sqrt(3), 1e-5))


def worth(engine, passes):
    return engine.get_epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(math.sqrt(passes), 1e-5))


def test_a_step_counts_for_the_pass_that_its_batch_is_of(tmp_path):
    with PrivacyEngine.open_ledger(tiny.module("bert"), tmp_path, client="ward", delta=1e-5) as ledger:
        engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False, ledger=ledger)
        first, second = iter(loader), iter(loader)
        next(first)
        optimizer.zero_grad()  # given up
        train_step(module, optimizer, next(second))
        train_step(module, optimizer, next(first))
        assert worth(engine, 2)
        assert ledger.epsilon() == pytest.approx(gaussian.epsilon_of(math.sqrt(2), 1e-5))


def test_an_evaluation_over_the_training_loader_is_no_pass():
    engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False)
    for _ in range(2):
        for batch in loader:  # all but the very first are fetched in eval mode
            module.train()
            train_step(module, optimizer, batch)
            module.eval()
            with torch.no_grad():
                for other in loader:
                    module(**other)
    assert engine.steps == 10
    assert worth(engine, 2)


def test_where_the_pass_of_a_batch_cannot_be_told_both_count():
    engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False)
    batch = next(iter(loader))
    optimizer.zero_grad()
    module.eval()
    next(iter(loader))
    module.train()
    module(**batch).loss.backward()
    optimizer.step()
    assert worth(engine, 2)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("make", [
    lambda: WeightedRandomSampler([1.0] * len(EXAMPLES), len(EXAMPLES)),
    lambda: RandomSampler(EXAMPLES, replacement=True),
])  # fmt: skip
def test_samplers_that_may_draw_an_example_twice_are_refused(make, poisson):
    loader = DataLoader(EXAMPLES, batch_size=6, sampler=make(), collate_fn=collator)
    model = tiny.module("bert").train()
    with pytest.raises(UserError, match=r"a sampler of its own \(.*RandomSampler\), which may draw an example twice"):
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            policy=Policy(DP), poisson_sampling=poisson,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["fast", "opacus", "loop"])
def test_an_example_never_counts_twice_in_one_step(mode):
    _engine, module, optimizer, loader = private(DP, grad_mode=mode)
    batch = next(iter(loader))
    for _ in range(2):
        module(**batch).loss.backward()
    with pytest.raises(UserError, match="went backward for a batch of"):
        optimizer.step()
    optimizer.zero_grad()
    twice = {key: torch.cat([value, value]) for key, value in next(iter(loader)).items()}
    module(**twice).loss.backward()
    with pytest.raises(UserError, match="counts twice"):
        optimizer.step()


def test_a_loader_that_looks_ahead_is_refused_at_once():
    _engine, _module, _optimizer, loader = private(DP, max_physical_batch_size=2)
    with pytest.raises(UserError, match="a second batch was fetched"):
        list(loader)


def test_an_evaluation_over_the_training_texts_is_no_training():
    engine, module, optimizer, loader = private(DP)
    module.eval()
    with torch.no_grad():
        assert sum(len(module(**batch).logits) for batch in loader) > 0
    module.train()
    train_step(module, optimizer, next(iter(loader)))
    assert engine.steps == 1


@pytest.mark.parametrize("poisson", [True, False])
def test_a_seeded_training_goes_on_as_if_it_had_not_stopped(poisson):
    def one(engine, module, optimizer, loader):
        no_dropout(module)
        optimizer.zero_grad()
        module(**next(iter(loader))).loss.backward()
        coins = noise.uniform(3, engine._coins)
        optimizer.step()
        return optimizer.last_message["classifier.weight"], coins

    whole = private(DP, seed=5, poisson_sampling=poisson)
    one(*whole)
    state, weights = whole[0].state_dict(), {k: v.clone() for k, v in whole[1].state_dict().items()}
    second = one(*whole)
    resumed = private(DP, seed=5, poisson_sampling=poisson)
    resumed[0].load_state_dict(state)
    resumed[1].load_state_dict(weights)
    again = one(*resumed)
    assert torch.equal(again[0], second[0])
    assert torch.equal(again[1], second[1])
    assert private(DP, seed=None)[0].state_dict()["generators"] == []


@pytest.mark.parametrize("mode", ["fast", "opacus", "loop"])
def test_a_step_without_a_gradient_says_what_is_missing(mode):
    _engine, module, optimizer, loader = private(DP, grad_mode=mode)
    with pytest.raises(UserError, match=r"step\(\) found no gradient; expected a forward pass in train mode"):
        optimizer.step()
    module(**next(iter(loader))).loss.backward()
    optimizer.zero_grad()
    with pytest.raises(UserError, match=r"step\(\) found no gradient"):
        optimizer.step()


def made_private(**changes):
    model = tiny.module("bert").train()
    loader = DataLoader(EXAMPLES, batch_size=6, collate_fn=collator)
    given = {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "data_loader": loader}
    return PrivacyEngine().make_private(**{**given, "policy": Policy(DP), **changes})


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"data_loader": [1, 2]}, "data_loader is a list; expected a torch"),
    ({"data_loader": DataLoader(TensorDataset(torch.zeros(0)), batch_size=2)}, "batch size 2 is larger than the 0"),
    ({"loss_reduction": "none"}, "loss_reduction is 'none'; expected 'mean' or 'sum'"),
    ({"seed": "a"}, "seed is 'a'; expected a whole number"),
    ({"seed": -1}, "seed is -1; expected a whole number"),
    ({"policy": Policy([{"layers": "all", "train": False}])}, "the policy trains nothing of this model"),
    ({"policy": "dp-sdg"}, "dp-sgd"),
])  # fmt: skip
def test_mistakes_at_the_door(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        made_private(**changes)


def test_a_model_or_loader_that_is_private_already_is_refused():
    engine, module, _optimizer, loader = private(DP)
    with pytest.raises(UserError, match="the data loader is private already"):
        made_private(data_loader=loader)
    with pytest.raises(UserError, match=r"the model is private already; expected close\(\)"):
        made_private(module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    engine.close()
    made_private(module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


def again(engine, module, **changes):
    loader = DataLoader(EXAMPLES, batch_size=6, collate_fn=collator)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    given = {"module": module, "optimizer": inner, "data_loader": loader, "policy": Policy(DP)}
    return engine.make_private(**{**given, **changes})


@pytest.mark.parametrize("closed", [False, True])
def test_a_second_training_before_the_first_step_books_nothing(tmp_path, closed):
    with PrivacyEngine.open_ledger(tiny.module("bert"), tmp_path, client="ward", delta=1e-5) as ledger:
        engine, module, optimizer, loader = private(DP, ledger=ledger)
        plan = engine.plan
        if closed:
            engine.close()
        quiet = Policy([{"layers": "all", "clip": 1.0, "noise": 9.0}])
        with pytest.raises(UserError, match="this engine serves another training already; expected an engine of its"):
            again(engine, tiny.module("bert").train(), policy=quiet, ledger=ledger)
        assert engine.plan is plan
        if not closed:
            train_step(module, optimizer, next(iter(loader)))
            assert ledger.epsilon() == pytest.approx(engine.get_epsilon(1e-5))


HEAD = Policy([{"layers": "all", "train": False}, {"layers": "head", "train": True, "clip": 1.0, "noise": 1.0}])


def flags(module):
    return [parameter.requires_grad for parameter in module.parameters()]


def test_what_a_policy_freezes_is_frozen_until_close():
    module = tiny.module("bert").train()
    module.get_input_embeddings().weight.requires_grad_(False)  # the caller's own
    before = flags(module)
    engine = PrivacyEngine()
    again(engine, module, policy=HEAD)
    assert sum(flags(module)) == 2
    engine.close()
    assert flags(module) == before
    other = PrivacyEngine()
    again(other, module)
    assert len(other.plan.trained) == sum(before)


@pytest.mark.parametrize("mode", ["fats", "opacus"])
def test_a_refused_set_up_leaves_module_and_engine_as_they_were(mode, monkeypatch):
    def refuse(*_arguments, **_named):
        raise UserError("refused")

    module, engine = tiny.module("bert").train(), PrivacyEngine()
    before = flags(module)
    with monkeypatch.context() as patched:
        patched.setattr("dpguard.engine.privacy_engine.ForwardHooks.__init__", refuse)  # the last that can go wrong
        with pytest.raises(UserError):
            again(engine, module, policy=HEAD, grad_mode=mode)
    assert flags(module) == before
    assert engine.plan is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    again(engine, module)
    assert len(engine.plan.trained) == len(before)


def test_tensors_without_clip_and_noise_never_join_the_optimizer():
    module = tiny.module("bert").train()
    inner = torch.optim.SGD(module.classifier.parameters(), lr=0.1)
    engine = PrivacyEngine()
    only = Policy([{"layers": "embeddings", "train": False}, {"layers": "all", "clip": 1.0, "noise": 1.0}])
    _module, optimizer, loader = again(engine, module, policy=only, optimizer=inner)
    added = torch.nn.Parameter(torch.zeros(3))
    for group in (added, [added], [("added", added)], [module.get_input_embeddings().weight]):
        with pytest.raises(UserError, match="1 of 1 tensors of the new group are not trained by the policy"):
            optimizer.add_param_group({"params": group})
    optimizer.add_param_group({"params": iter(module.bert.pooler.parameters()), "lr": 0.2})
    before = module.bert.pooler.dense.bias.detach().clone()
    sent = train_step(module, optimizer, next(iter(loader)))
    moved = before - module.bert.pooler.dense.bias
    assert torch.allclose(moved, 0.2 * sent["bert.pooler.dense.bias"], atol=1e-6)
    optimizer.param_groups[0]["params"].append(added)
    with pytest.raises(UserError, match=r"a tensor of shape \(3,\) that make_private did not see"):
        train_step(module, optimizer, next(iter(loader)))
    assert engine.steps == 1


def test_batch_normalisation_anywhere_is_named_before_the_policy_is_read():
    model = tiny.module("bert").train()
    model.bert.pooler = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    with pytest.raises(UserError, match=r"'bert\.pooler\.1' is batch normalisation, which couples examples"):
        made_private(module=model)


def test_a_policy_may_be_given_by_name():
    module, optimizer, _loader = made_private(policy="dp-sgd")
    assert len(optimizer.plan.trained) == len(list(module.parameters()))


def test_a_client_takes_what_a_loader_gives():
    model = tiny.module("bert")
    client = dpguard.Client(model, Policy(DP), seed=0)
    batch = collator(EXAMPLES[:3])
    update = client.observe(batch)
    assert update.batch_size == 3
    assert client.observe([batch, batch]).local_steps == 2
    with pytest.raises(UserError, match="a batch is a str; expected a Batch"):
        client.observe("text")
    with pytest.raises(UserError, match="batch_size is 0; expected a whole number of at least 1"):
        Client(model, Policy(DP).plan(slots(model)), batch_size=0)


def test_a_folder_that_is_a_file_holds_no_ledger(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep a ledger in"):
        PrivacyEngine.open_ledger(tiny.module("bert"), tmp_path / "file", client="ward", delta=1e-5)


def test_a_closed_ledger_is_refused_before_any_step(tmp_path):
    ledger = PrivacyEngine.open_ledger(tiny.module("bert"), tmp_path, client="ward", delta=1e-5)
    ledger.close()
    with pytest.raises(UserError, match="is closed"):
        private(DP, ledger=ledger)
    assert "Ledger(client 'ward', 0 messages" in repr(ledger)
