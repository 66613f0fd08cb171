"""The gate is the rehearsal's own code: same update, table and noise give what a study's client would have sent."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dpguard.deploy.checks import Refused
from dpguard.deploy.gate import before_the_gate, outgoing
from dpguard.deploy.rehearsal import content_of
from dpguard.engine import noise
from dpguard.engine.client import Client
from dpguard.engine.local import LocalTraining
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.deploy import cases

TEXTS = ["the nurse called about her new test result today", "yes", "the old bank card was lost", "no pain in the arm"]
SEED = 5


def batches():
    return [collate(TEXTS[k : k + 2], [0, 1], tiny.tokenizer()) for k in (0, 2)]


def setup(name):
    model = cases.model().module
    plan = Policy(cases.TABLES[name][0]).plan(slots(model))
    return model, plan, {n: p.detach() for n, p in model.named_parameters()}


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", cases.TABLES)
def test_a_gradient_through_the_gate_is_the_clients_message_to_the_bit(name):
    model, plan, base = setup(name)
    client = Client(model, plan, seed=SEED, batch_size=3)
    expected = client.observe(batches()[0]).tensors
    sums = client.clipped(batches()[0]).sums
    kept = {n: v.clone() for n, v in sums.items()}
    found = outgoing(sums, plan, content="clipped", batch_size=3, generator=noise.source(SEED), base=base)
    same(found.wire, expected)
    same(sums, kept)
    assert set(found.home) == set(plan.withheld)


@pytest.mark.parametrize("name", [n for n in cases.TABLES if n != "withheld, whole update"])
def test_a_difference_through_the_gate_is_the_clients_message_to_the_bit(name):
    model, plan, base = setup(name)
    how = {"batch_size": 3, "training": LocalTraining("sgd", 0.1), "mask_seed": 7}
    expected = Client(model, plan, seed=SEED, **how).observe(batches()).tensors
    inner = Client(model, before_the_gate(plan), seed=SEED, **how)
    source = inner._source = noise.source(SEED)  # one stream: local steps first, then the gate
    found = outgoing(
        inner.observe(batches()).tensors, plan,
        content=content_of(plan, "delta"), batch_size=3, generator=source, base=base, mask_seed=7,
    )  # fmt: skip
    same(found.wire, expected)


def test_a_training_step_with_opacus_calling_convention_sends_the_gates_tensors():
    made = cases.model()
    plan = Policy(cases.TABLES["per block, partial"][0]).plan(slots(made.module))
    rows = [{"input_ids": b.input_ids[i], "labels": b.labels[i]} for b in batches() for i in range(2)][:1] * 4
    module = made.module.train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    engine = PrivacyEngine()
    loader = DataLoader(rows, batch_size=4)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=loader, policy=plan,
        seed=SEED, poisson_sampling=False,
    )  # fmt: skip
    sums = {}
    emit = optimizer._emit

    def listen(clipped, number):
        sums.update({name: value.clone() for name, value in clipped.sums.items()})
        emit(clipped, number)

    optimizer._emit = listen
    for part in loader:
        optimizer.zero_grad()
        module(**part).loss.backward()
        optimizer.step()
    found = outgoing(sums, plan, content="clipped", batch_size=4, generator=noise.source(SEED))
    same(found.wire, optimizer.last_message)


def test_only_what_is_shared_is_clipped_together():
    """A withheld tensor that is along cannot take up room under the clip, and does not leave."""
    _model, plan, base = setup("withheld, whole update")
    update = {n: torch.full_like(base[n], 1e-3) for n in plan.trained}
    quiet = Policy([{**row, "noise": 0.0} if "noise" in row else row for row in plan_rows(plan)]).plan(
        [rule.slot for rule in plan.values()]
    )
    found = outgoing(update, quiet, content="raw", batch_size=1, generator=noise.source(0), base=base).wire
    assert set(found) == set(plan.shared)
    norm = torch.stack([v.norm() for v in found.values()]).norm()
    sent = torch.stack([update[n].norm() for n in plan.shared]).norm()
    assert float(norm) == pytest.approx(min(1.0, float(sent)), rel=1e-5)


def plan_rows(plan):
    return [dict(row) for row in plan.rows]


@pytest.mark.parametrize(("name", "content"), [("dp-sgd, differences", "raw"), ("whole update", "noised")])
def test_a_clip_that_cannot_be_made_here_is_refused(name, content):
    _model, plan, base = setup(name)
    update = {n: torch.full_like(base[n], 1e-3) for n in plan.shared}
    with pytest.raises(Refused, match="declared"):
        outgoing(update, plan, content=content, batch_size=1, generator=noise.source(0), base=base)


def test_a_difference_needs_weights_to_compare_with():
    _model, plan, base = setup("whole update")
    update = {n: torch.full_like(base[n], 1e-3) for n in plan.shared}
    with pytest.raises(Refused, match="compare"):
        outgoing(update, plan, content="raw", batch_size=1, generator=noise.source(0))
