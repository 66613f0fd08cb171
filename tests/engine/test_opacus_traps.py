"""Opacus's pitfalls O1 to O11 (measured with 1.6.0): each test shows that ours does not have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader

from dpguard.engine import gradients, wire
from dpguard.engine.client import Client
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import slots
from dpguard.policy import gaussian
from dpguard.policy.table import Policy
from tests import tiny

EXAMPLES = [(s, i % 3 % 2) for i, s in enumerate(tiny.SENTENCES * 10)]


def collator(items):
    batch = collate([t for t, _ in items], [y for _, y in items], tiny.tokenizer())
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def private(rows, *, family="bert", batch_size=6, seed=0, optimizer=torch.optim.SGD, rate=0.1, **more):
    model = tiny.module(family).train()
    loader = DataLoader(EXAMPLES, batch_size=batch_size, collate_fn=collator)
    engine = PrivacyEngine()
    inner = optimizer(model.parameters(), lr=rate)
    out = engine.make_private(module=model, optimizer=inner, data_loader=loader, policy=Policy(rows), seed=seed, **more)
    return engine, *out


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train_step(module, optimizer, batch):
    optimizer.zero_grad()
    module(**batch).loss.backward()
    optimizer.step()
    return optimizer.last_message


def test_o1_each_group_has_its_own_clip_and_its_own_noise():
    rows = [{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "clip": 0.01}]
    model = tiny.module("bert")
    plan = Policy(rows).plan(slots(model))
    empty = collate([], [], tiny.tokenizer())
    draws = [Client(model, plan, seed=s, batch_size=1).observe(empty).tensors for s in range(40)]
    std = {
        n: torch.stack([d[n] for d in draws]).std().item() for n in ("bert.pooler.dense.weight", "classifier.weight")
    }
    assert std["bert.pooler.dense.weight"] == pytest.approx(1.0, rel=0.05)
    assert std["classifier.weight"] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_o1_position_embeddings_are_clipped_example_by_example(family):
    # default position ids are one broadcast row: Opacus clips the whole batch's gradient once (issue #841)
    rows = [
        {"layers": "embeddings.position", "clip": 0.01},
        {"layers": ["embeddings.token", "block[*]", "head"], "train": False},
    ]
    _engine, module, optimizer, _loader = private(rows, family=family, batch_size=6)
    no_dropout(module)
    causal = module.config.model_type == "gpt2"
    one = collate([tiny.SENTENCES[0]], [0], tiny.tokenizer(causal))
    two = collate([tiny.SENTENCES[0]] * 2, [0, 0], tiny.tokenizer(causal))
    as_arguments = [
        {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "labels": b.labels} for b in (one, two)
    ]
    module.zero_grad()
    sums = []
    for batch in as_arguments:
        optimizer.zero_grad()
        module(**batch).loss.backward()
        name = next(n for n in optimizer.plan.trained if "position" in n or "wpe" in n)
        sums.append(optimizer.mode.collect().sums[name])
    assert sums[0].norm().item() == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(sums[1], 2 * sums[0], rtol=1e-4, atol=1e-8), "two equal examples weigh twice one"


def test_o2_noise_follows_the_clip_that_is_applied():
    for clip in (0.01, 1.0, 100.0):
        model = tiny.module("bert")
        plan = Policy([{"layers": "all", "clip": clip, "noise": 0.5}]).plan(slots(model))
        noise = Client(model, plan, seed=0, batch_size=1).observe(collate([], [], tiny.tokenizer())).tensors
        assert noise["bert.pooler.dense.weight"].std().item() == pytest.approx(0.5 * clip, rel=0.05)


def test_o3_a_language_models_loss_does_not_couple_examples():
    model = no_dropout(tiny.module("gpt2-lm").train())
    tokens = collate(tiny.SENTENCES, [0, 0, 0], tiny.tokenizer(causal=True))
    batch = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": tokens.input_ids}
    engine = PrivacyEngine()
    loader = DataLoader(list(range(30)), batch_size=3)
    module, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        policy=Policy([{"layers": "all", "clip": 1e6}]), seed=0, grad_mode="opacus",
    )  # fmt: skip

    def first_example(rows):
        optimizer.zero_grad()
        module(**{k: v[:rows] for k, v in batch.items()}).loss.backward()
        return {n: p.grad_sample[0].clone() for n, p in module.named_parameters() if p.requires_grad}

    alone, together = first_example(1), first_example(3)
    for name, value in alone.items():
        assert torch.allclose(value, together[name], rtol=1e-3, atol=1e-6), name


def test_o4_one_nan_example_is_dropped_and_counted(monkeypatch):
    model = tiny.module("bert")
    plan = Policy([{"layers": "all", "clip": 1.0, "noise": 0.5}]).plan(slots(model))
    batch = collate(tiny.SENTENCES, [0, 1, 0], tiny.tokenizer())
    true = gradients.per_example_losses

    def poisoned(model, batch, **more):
        losses = true(model, batch, **more)
        return losses * torch.tensor([1.0, float("nan"), 1.0])[: len(losses)]

    clean = Client(model, plan, seed=0, batch_size=3).observe(Batch(*(t[[0, 2]] for t in vars(batch).values()))).tensors
    monkeypatch.setattr("dpguard.engine.client.per_example_losses", poisoned)
    client = Client(model, plan, seed=0, batch_size=3)
    sent = client.observe(batch).tensors
    assert client.dropped == 1
    for name, value in sent.items():
        assert torch.isfinite(value).all()
        assert torch.allclose(value, clean[name], atol=1e-5), name


def test_o5_rate_and_divisor_come_from_public_numbers():
    engine, _module, optimizer, loader = private([{"layers": "all", "clip": 1.0, "noise": 1.0}], batch_size=7)
    # 30 examples, batch 7: a loader of 5 batches would give rate .2 and expected batch size 6
    assert engine.sampling_rate == pytest.approx(7 / 30)
    assert optimizer.batch_size == 7
    assert len(loader) == round(30 / 7)


def test_o6_and_o7_an_empty_poisson_batch_is_a_step_of_pure_noise():
    rows = [{"layers": "all", "clip": 1.0, "noise": 1.0}]
    engine, module, optimizer, loader = private(rows, batch_size=1, seed=11)
    sizes = []
    for batch in loader:
        sizes.append(len(batch["labels"]))
        sent = train_step(module, optimizer, batch)
        assert torch.isfinite(sent["classifier.weight"]).all()
        if sizes[-1] == 0:
            # noise alone: 1.0 over a divisor of 1, and nothing of the placeholder row that the model was fed
            assert sent["bert.encoder.layer.0.output.dense.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    assert 0 in sizes
    assert engine.steps == len(sizes)


def test_o6_empty_and_one_example_differ_by_at_most_the_clip():
    model = tiny.module("bert")
    plan = Policy([{"layers": "all", "clip": 0.3, "noise": 1.0}]).plan(slots(model))
    client = Client(model, plan, batch_size=4)
    one = client.message(collate([tiny.SENTENCES[0]], [1], tiny.tokenizer()), torch.Generator().manual_seed(5)).noised
    none = client.message(collate([], [], tiny.tokenizer()), torch.Generator().manual_seed(5)).noised
    moved = math.sqrt(sum(float((one[n].double() - none[n].double()).pow(2).sum()) for n in one))
    assert moved == pytest.approx(0.3, rel=1e-3)


def test_o8_epsilon_is_never_the_central_limit_approximation():
    engine, module, optimizer, loader = private([{"layers": "all", "clip": 1.0, "noise": 1.0}], batch_size=30)
    train_step(module, optimizer, next(iter(loader)))
    assert engine.get_epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(1.0, 1e-5)), "q = 1, one step: 4.377"


def test_o9_tiny_noise_has_an_epsilon():
    engine, module, optimizer, loader = private([{"layers": "all", "clip": 1.0, "noise": 0.01}])
    train_step(module, optimizer, next(iter(loader)))
    assert 100 < engine.get_epsilon(1e-3) < math.inf


def test_o10_watching_the_message_does_not_stop_the_accounting():
    engine, module, optimizer, loader = private([{"layers": "all", "clip": 1.0, "noise": 1.0}])
    seen = []
    for batch in loader:
        train_step(module, optimizer, batch)
        seen.append(optimizer.last_message)
    assert engine.steps == len(seen) == len(loader)
    assert engine.get_epsilon(1e-3) > engine.get_guarantee(1e-3, steps=1).epsilon


@pytest.mark.parametrize("rows", [
    [{"layers": "all", "clip": 0.1, "noise": 0.7, "per": "block"}],
    [{"layers": "all", "clip": 0.1, "noise": 0.7, "keep": 0.2, "bits": 4}],
    [{"layers": "all", "clip": 0.1, "noise": 0.7}, {"layers": "embeddings", "share": False}],
])  # fmt: skip
def test_o11_the_message_that_trains_is_the_message_that_is_observed(rows):
    """Same weights, batch and source of noise: make_private steps on exactly what a Client would send."""
    engine, module, optimizer, loader = private(rows, batch_size=3, poisson_sampling=False)
    no_dropout(module)
    batch = next(iter(loader))
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    noise = optimizer.source.get_state()
    sent = train_step(module, optimizer, batch)
    engine.close()
    twin = tiny.module("bert")
    twin.load_state_dict({**twin.state_dict(), **start})
    client = Client(twin, Policy(rows).plan(slots(twin)), batch_size=3)
    generator = torch.Generator()
    generator.set_state(noise)
    observed = client.message(Batch(batch["input_ids"], batch["attention_mask"], batch["labels"]), generator)
    assert set(sent) == set(observed.wire)
    for name, value in sent.items():
        assert torch.allclose(value, observed.wire[name], atol=2e-6), name
        moved = (start[name] - module.get_parameter(name)) / 0.1
        assert torch.allclose(moved, value, atol=2e-6), "the optimizer stepped on the message itself"
    for name in optimizer.plan.withheld:
        moved = (start[name] - module.get_parameter(name)) / 0.1
        assert torch.allclose(moved, observed.noised[name] / 3, atol=2e-6), "withheld layers learn at home"


def test_the_module_loses_every_hook_when_the_engine_is_closed():
    engine, module, _optimizer, _loader = private([{"layers": "all", "clip": 1.0}])
    engine.close()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert isinstance(wire.clip_factors(torch.ones(1), 1.0), torch.Tensor)
