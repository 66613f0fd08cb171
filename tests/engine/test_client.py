from __future__ import annotations

import pytest
import torch

from dpguard.engine import gradients
from dpguard.engine.client import Client
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny

FAMILIES = (*tiny.FAMILIES, "gpt2-lm")
PER = ("row", "block", "role", "tensor")


def batch_for(model, texts=tiny.SENTENCES):
    batch = collate(texts, [i % 2 for i in range(len(texts))], tiny.tokenizer(model.config.model_type == "gpt2"))
    if hasattr(model, "lm_head"):
        return type(batch)(batch.input_ids, batch.attention_mask, batch.input_ids)
    return batch


def one_by_one(model, plan, batch):
    """The reference: plain autograd on every example alone, clipped by hand, summed."""
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in plan.trained}
    for i in range(len(batch)):
        with gradients.running_as(model, "eval"):
            grads = gradients.gradient(model, batch.rows(slice(i, i + 1)), plan.trained)
        for name in plan.trained:
            group = plan.groups.get(plan[name].group)
            norm = torch.cat([grads[n].double().flatten() for n in group.names]).norm() if group else torch.tensor(0.0)
            factor = min(1.0, group.clip / norm.item()) if group and norm > 0 else 1.0
            total[name] += factor * grads[name]
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per", PER)
def test_exact_against_one_example_at_a_time(family, per):
    model = tiny.module(family)
    plan = Policy([{"layers": "all", "clip": 0.05, "per": per}]).plan(slots(model))
    batch = batch_for(model)
    assert batch.attention_mask.sum(1).unique().numel() > 1, "padding must be part of this"
    found, wanted = Client(model, plan, seed=0).observe(batch).tensors, one_by_one(model, plan, batch)
    assert set(found) == set(plan.trained)
    size = torch.cat([w.flatten() for w in wanted.values()]).norm()
    for name, value in found.items():
        # sums are divided by the public batch size on the wire; key biases have zero gradient but for rounding
        assert (value * 3 - wanted[name]).norm() <= 1e-5 * max(wanted[name].norm(), 1e-2 * size), name


def test_the_model_is_left_as_it_was_found():
    model = tiny.module("bert")
    model.bert.pooler.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())
    plan = Policy.load("dp-sgd").plan(slots(model))
    Client(model, plan, seed=0).observe(batch_for(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_of_the_callers_own_are_left_as_they_were(steps):
    model = tiny.module("bert")
    plan = Policy([{"layers": "all", "clip": 1.0}, {"layers": "head", "train": False}]).plan(slots(model))
    batch = batch_for(model)
    unseen = Client(model, plan, seed=0).observe([batch] * steps if steps else batch).tensors
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 7.0)
    kept = {name: p.grad for name, p in model.named_parameters()}
    seen = Client(model, plan, seed=0).observe([batch] * steps if steps else batch).tensors
    assert all(torch.equal(seen[name], unseen[name]) for name in unseen), "and they are no part of the message"
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept[name]
        assert parameter.grad is None or bool((parameter.grad == 7.0).all())


def test_fresh_noise_every_time_and_none_that_repeats_without_a_seed():
    model = tiny.module("bert")
    plan = Policy.load("dp-sgd").plan(slots(model))
    batch, name = batch_for(model), "classifier.weight"
    seeded = Client(model, plan, seed=1)
    first, second = seeded.observe(batch).tensors[name], seeded.observe(batch).tensors[name]
    assert not torch.equal(first, second)
    assert torch.equal(first, Client(model, plan, seed=1).observe(batch).tensors[name])
    entropy = [Client(model, plan).observe(batch).tensors[name] for _ in range(2)]
    assert not torch.equal(*entropy)


def test_an_empty_batch_is_pure_noise():
    model = tiny.module("bert")
    plan = Policy.load("dp-sgd").plan(slots(model))
    sent = Client(model, plan, seed=0, batch_size=8).observe(collate([], [], tiny.tokenizer())).tensors
    assert set(sent) == set(plan.shared)
    assert sent["bert.encoder.layer.0.output.dense.weight"].std().item() == pytest.approx(0.8 / 8, rel=0.05)


def test_the_update_carries_no_private_diagnostics():
    model = tiny.module("bert")
    plan = Policy.load("dp-sgd").plan(slots(model))
    update = Client(model, plan, seed=3, batch_size=8).observe(batch_for(model))
    assert set(vars(update)) == {
        "tensors",
        "batch_size",
        "kind",
        "mode",
        "mask_seed",
        "local_steps",
        "training",
        "clients",
    }
    assert update.batch_size == 8, "the public size, not the three rows that came"


def test_dropout_is_what_the_client_says_it_is():
    model = tiny.module("bert")
    plan = Policy([]).plan(slots(model))
    batch, name = batch_for(model), "classifier.weight"
    still = [Client(model, plan, mode="eval", dropout_seed=s).observe(batch).tensors[name] for s in (1, 2)]
    moving = [Client(model, plan, mode="train", dropout_seed=s).observe(batch).tensors[name] for s in (1, 2, 2)]
    assert torch.equal(*still)
    assert not torch.equal(moving[0], moving[1])
    assert torch.equal(moving[1], moving[2])
    with pytest.raises(UserError, match="expected 'eval' or 'train'"):
        Client(model, plan, mode="test")


def test_random_numbers_on_other_devices_are_left_alone(monkeypatch):
    """``torch.manual_seed`` seeds every device, and only those that are known of would be put back."""

    def everywhere(_seed):
        raise AssertionError("every device was seeded")

    model = tiny.module("bert")
    plan = Policy([]).plan(slots(model))
    monkeypatch.setattr(torch, "manual_seed", everywhere)
    assert Client(model, plan, mode="train", seed=0).observe(batch_for(model)).tensors


def test_a_plan_of_another_model_is_refused():
    plan = Policy([]).plan(slots(tiny.module("bert")))
    with pytest.raises(UserError, match="of another model"):
        Client(tiny.module("roberta"), plan)
    with pytest.raises(UserError, match="of another model"):
        Client(tiny.module("bert", blocks=2), plan)
