from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.sampling import PoissonSampler
from dpguard.errors import UserError
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_opacus_traps import EXAMPLES, collator, private, train_step

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]


def test_an_ordinary_training_loop_learns():
    engine, module, optimizer, loader = private(
        [{"layers": "all", "clip": 1.0, "noise": 0.02}], batch_size=15, optimizer=torch.optim.Adam, rate=3e-3
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    losses = []
    for _ in range(20):
        for batch in loader:
            optimizer.zero_grad()
            loss = module(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert engine.steps == 40
    assert math.isfinite(engine.get_epsilon(1e-3))


def test_epsilon_before_during_and_without_a_claim():
    engine, module, optimizer, loader = private(DP)
    assert engine.get_epsilon(1e-3) == 0
    spent = []
    for batch in loader:
        train_step(module, optimizer, batch)
        spent.append(engine.get_epsilon(1e-3))
    assert spent == sorted(spent)
    assert spent[0] > 0
    bare, module, optimizer, loader = private([])
    train_step(module, optimizer, next(iter(loader)))
    assert bare.get_epsilon(1e-3) == math.inf
    with pytest.raises(UserError, match="larger than 1 / 30"):
        engine.get_epsilon(0.1)


def test_fixed_batches_get_no_amplification():
    engine, module, optimizer, loader = private(DP, poisson_sampling=False)
    for batch in loader:
        train_step(module, optimizer, batch)
    assert engine.get_guarantee(1e-3).statement.count("without amplification") == 1


def test_seeded_runs_repeat_and_unseeded_ones_do_not():
    def weights(seed):
        _engine, module, optimizer, loader = private(DP, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for batch in loader:
                train_step(module, optimizer, batch)
        return module.classifier.weight.detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert not torch.equal(weights(None), weights(None))


def test_clipped_fraction():
    tight, module, optimizer, loader = private([{"layers": "all", "clip": 1e-4}])
    train_step(module, optimizer, next(iter(loader)))
    loose, module, optimizer, loader = private([{"layers": "all", "clip": 1e4}])
    train_step(module, optimizer, next(iter(loader)))
    assert (tight.clipped_fraction, loose.clipped_fraction) == (1.0, 0.0)


def test_folding_parts_gives_the_same_sum():
    _engine, module, optimizer, _ = private([{"layers": "all", "clip": 0.1, "per": "block"}])
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    batch = collator(EXAMPLES[:6])

    def sums(parts):
        optimizer.zero_grad()
        for part in parts:
            rows = {k: v[part] for k, v in batch.items()}
            module(**rows).loss.backward()
            optimizer.fold()
        return optimizer.mode.collect().sums

    whole, split = sums([slice(0, 6)]), sums([slice(0, 2), slice(2, 3), slice(3, 6)])
    for name, value in whole.items():
        assert torch.allclose(value, split[name], atol=1e-6), name


def test_poisson_inclusion_is_a_coin_for_every_example():
    sampler = PoissonSampler(50, 5, torch.Generator().manual_seed(0))
    counts, sizes, pairs = torch.zeros(50), [], 0
    rounds = 400
    for _ in range(rounds):
        for drawn in sampler:
            counts[drawn] += 1
            sizes.append(len(drawn))
            pairs += {0, 1} <= set(drawn)
    steps = rounds * len(sampler)
    chi_square = ((counts - 0.1 * steps) ** 2 / (0.1 * 0.9 * steps)).sum().item()
    assert 20 < chi_square < 95, "chi-square of 50 fair coins"
    assert torch.tensor(sizes).float().var().item() == pytest.approx(4.5, rel=0.1)
    assert pairs / steps == pytest.approx(0.01, rel=0.4)


class Endless(IterableDataset):
    def __iter__(self):
        yield from EXAMPLES


def setup(**changes):
    model = changes.pop("module", None) or tiny.module("bert").train()
    given = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(EXAMPLES, batch_size=4, collate_fn=collator),
        "policy": Policy(DP),
    }
    return PrivacyEngine().make_private(**{**given, **changes})


def test_bad_set_ups_are_one_sentence_before_any_step():
    with pytest.raises(UserError, match="eval mode"):
        setup(module=tiny.module("bert"))
    with pytest.raises(UserError, match="not the module's"):
        setup(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(UserError, match="no length"):
        setup(data_loader=DataLoader(Endless(), batch_size=4))
    with pytest.raises(UserError, match="larger than the 30 examples"):
        setup(data_loader=DataLoader(EXAMPLES, batch_size=31))
    with pytest.raises(UserError, match="unknown column"):
        setup(policy=Policy([{"layers": "all", "clp": 1.0}]))
    normed = tiny.module("bert").train()
    normed.dropout = nn.Sequential(normed.dropout, nn.BatchNorm1d(64))
    for parameter in normed.dropout[1].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError):
        setup(module=normed)
    checkpointed = tiny.module("bert").train()
    checkpointed.bert.encoder.gradient_checkpointing = True
    with pytest.raises(UserError, match="gradient checkpointing"):
        setup(module=checkpointed)


def test_a_trained_parameter_that_the_loss_does_not_use_is_named():
    engine, module, optimizer, _ = private(DP)
    optimizer.zero_grad()
    module.bert.embeddings(torch.tensor([[2, 6, 3]])).sum().backward()
    with pytest.raises(RuntimeError, match="took no part in the loss"):
        optimizer.step()
    assert engine.steps == 0
