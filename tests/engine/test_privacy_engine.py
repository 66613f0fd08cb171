from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dpguard.engine.accounting import guarantee
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.sampling import Part, PoissonSampler, alike
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_opacus_traps import EXAMPLES, collator, no_dropout, private, train_step

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


def test_diagnostics_know_the_clipped_fraction_and_the_signal_to_noise():
    tight, module, optimizer, loader = private([{"layers": "all", "clip": 1e-4, "noise": 0.5}])
    train_step(module, optimizer, next(iter(loader)))
    loose, module, optimizer, loader = private([{"layers": "all", "clip": 1e4, "noise": 0.5}])
    train_step(module, optimizer, next(iter(loader)))
    assert (tight.diagnostics.clipped_fraction, loose.diagnostics.clipped_fraction) == (1.0, 0.0)
    frame = tight.diagnostics.to_frame()
    assert list(frame.columns) == ["group", "clip", "clipped_fraction", "signal_to_noise"]
    assert frame.loc[0, "signal_to_noise"] > 100 * loose.diagnostics.to_frame().loc[0, "signal_to_noise"] > 0
    assert tight.diagnostics.steps == 1


def test_folding_parts_gives_the_same_sum():
    rows = [{"layers": "all", "clip": 0.1, "per": "block"}]
    _engine, module, optimizer, loader = private(rows, poisson_sampling=False)
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0

    def sums(parts):
        batch = next(iter(loader))  # the first six, both times
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


def test_a_large_batch_in_physical_parts_is_the_same_step():
    def weights(physical):
        _engine, module, optimizer, loader = private(DP, seed=3, batch_size=8, max_physical_batch_size=physical)
        no_dropout(module)
        sizes = []
        for part in loader:
            train_step(module, optimizer, part)
            sizes.append((len(part["input_ids"]), optimizer.stepped))
        return torch.cat([p.detach().flatten() for p in module.parameters()]), sizes, _engine

    whole, sizes, engine = weights(None)
    parts, part_sizes, other = weights(3)
    assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-7)
    assert all(stepped for _, stepped in sizes)
    assert max(n for n, _ in part_sizes) <= 3
    assert sum(n for n, _ in sizes) == sum(n for n, _ in part_sizes)
    assert engine.steps == other.steps == sum(stepped for _, stepped in part_sizes)
    assert engine.diagnostics.clipped_fraction == other.diagnostics.clipped_fraction


@pytest.mark.parametrize("rows", [DP, [{"layers": "all", "train": True}]], ids=["clipped", "plain"])
def test_parts_of_like_length_are_the_same_steps(rows):
    lengths = [len(tiny.tokenizer()(text)["input_ids"]) for text, _ in EXAMPLES]

    def weights(**more):
        _engine, module, optimizer, loader = private(rows, seed=3, batch_size=12, **more)
        no_dropout(module)
        shapes = []
        for part in loader:
            train_step(module, optimizer, part)
            shapes.append(tuple(part["input_ids"].shape))
        return torch.cat([p.detach().flatten() for p in module.parameters()]), shapes, _engine.steps

    whole, one, steps = weights()
    cut, many, same = weights(max_physical_batch_size=4, lengths=lengths)
    assert torch.allclose(whole, cut, rtol=1e-5, atol=1e-7)
    assert steps == same
    assert max(rows for rows, _ in many) <= 4
    assert sum(rows for rows, _ in one) == sum(rows for rows, _ in many)
    assert sum(rows * width for rows, width in many) < sum(rows * width for rows, width in one)


def test_lengths_of_other_data_are_refused():
    with pytest.raises(UserError, match="lengths has 3 entries; expected one for each of the"):
        private(DP, lengths=[3, 4, 5])


def test_a_cut_along_the_lengths_computes_the_fewest_tokens():
    def cost(lengths, ends, each):
        return sum((e - s) * lengths[e - 1] + each for s, e in zip([0, *ends], ends, strict=False))

    draw = random.Random(5)
    for _ in range(30):
        lengths = sorted(draw.randint(1, 40) for _ in range(draw.randint(1, 9)))
        size, each, last = draw.randint(1, 9), draw.choice([0, 10, 64]), len(lengths)
        found = alike(lengths, size, each)
        cuts = ([*inner, last] for many in range(last) for inner in itertools.combinations(range(1, last), many))
        allowed = [c for c in cuts if all(e - s <= size for s, e in zip([0, *c], c, strict=False))]
        assert found in allowed
        assert cost(lengths, found, each) == min(cost(lengths, c, each) for c in allowed)


def test_a_batch_left_half_way_is_dropped_whole():
    def after(interrupted):
        _engine, module, optimizer, loader = private(
            [{"layers": "all", "clip": 0.1}], seed=3, batch_size=8, max_physical_batch_size=2
        )
        no_dropout(module)
        if interrupted:
            train_step(module, optimizer, next(iter(loader)))
        optimizer.begin_part(Part(True, True, 3, 1))
        train_step(module, optimizer, collator(EXAMPLES[:3]))
        return module.classifier.weight.detach(), _engine.steps

    (one, steps), (two, same) = after(False), after(True)
    assert torch.equal(one, two)
    assert steps == same == 1


@pytest.mark.parametrize("rows", [DP, [{"layers": "all", "train": True}]])
def test_two_batches_in_one_step_are_refused(rows):
    _engine, module, optimizer, loader = private(rows)
    parts = iter(loader)
    module(**next(parts)).loss.backward()
    with pytest.raises(UserError, match="a second batch was fetched before step"):
        next(parts)
    parts = iter(loader)
    optimizer.zero_grad()
    for _ in range(2):
        train_step(module, optimizer, next(parts))


@pytest.mark.parametrize("rows", [[{"layers": "all", "clip": 1e6}], [{"layers": "all", "train": True}]])
def test_without_zero_grad_the_last_message_does_not_come_back(rows):
    def weights(zero):
        _engine, module, optimizer, loader = private(rows)
        no_dropout(module)
        for batch in loader:
            if zero:
                optimizer.zero_grad()
            module(**batch).loss.backward()
            optimizer.step()
        return module.classifier.weight.detach()

    assert torch.equal(weights(True), weights(False))


def test_a_clip_that_follows_a_quantile_moves_towards_it_and_is_charged_for():
    rows = [{"layers": "all", "clip": {"quantile": 0.5, "start": 100.0, "rate": 1.0, "count_noise": 1.0}, "noise": 1.0}]
    engine, module, optimizer, loader = private(rows, batch_size=8)
    no_dropout(module)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(12):
        for batch in loader:
            train_step(module, optimizer, batch)
    frame = engine.diagnostics.to_frame()
    assert frame.loc[0, "clip"] < 20
    same = Policy([{"layers": "all", "clip": 100.0, "noise": 1.0}]).plan(slots(module))
    free = guarantee(same, sampling_rate=engine.sampling_rate, steps=engine.steps, delta=1e-5).epsilon
    assert engine.get_epsilon(1e-5) > free * 1.01


def test_a_whole_update_is_clipped_and_noised_once_for_the_client():
    rows = [{"layers": "all", "clip": 0.01, "noise": 0.0, "unit": "update"}]
    engine, module, optimizer, loader = private(rows, batch_size=4)
    train_step(module, optimizer, next(iter(loader)))
    norm = torch.stack([v.norm() for v in optimizer.last_message.values()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-4)
    noisy = [{"layers": "all", "clip": 0.01, "noise": 2.0, "unit": "update"}]
    engine, module, optimizer, loader = private(noisy, batch_size=4)
    train_step(module, optimizer, next(iter(loader)))
    drawn = torch.cat([v.flatten() for v in optimizer.last_message.values()])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)
    assert engine.get_guarantee(1e-5).unit == "client"
