"""Local steps, rounds and aggregates: what leaves is exactly what plain PyTorch would have made, then the policy."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dpguard.engine.accounting import guarantee
from dpguard.engine.client import Client
from dpguard.engine.gradients import per_example_losses, running_as
from dpguard.engine.local import LocalTraining
from dpguard.engine.update import Update, aggregate
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.ledger import BudgetSpent, Ledger
from dpguard.policy.table import Policy
from tests import tiny

TEXTS = ["the nurse called about her new test result today", "yes", "the old bank card was lost", "no pain in the arm"]
OPEN = [{"layers": "all", "train": True}]


def batches(count, rows=2):
    out = []
    for k in range(count):
        texts = [TEXTS[(k + i) % len(TEXTS)] for i in range(rows)]
        out.append(collate(texts, [(k + i) % 2 for i in range(rows)], tiny.tokenizer()))
    return out


def client(rows, *, seed=0, family="bert", **more):
    model = tiny.module(family, width=16, blocks=2).double()
    return Client(model, Policy(rows).plan(slots(model)), seed=seed, **more)


def by_hand(model, steps, make):
    """The same steps by plain PyTorch: weights after minus weights before."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make(model.parameters())
    with running_as(model, "eval"):
        for batch in steps:
            optimizer.zero_grad()
            per_example_losses(model, batch).mean().backward()
            optimizer.step()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("training", "make"),
    [
        (LocalTraining("sgd", 0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        (LocalTraining("sgd", 0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        (LocalTraining("adam", 1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
    ],
)
@pytest.mark.parametrize(
    "rows", [OPEN, [{"layers": "all", "clip": 1e9, "unit": "update"}], [{"layers": "all", "clip": 1e9}]]
)
def test_an_open_policys_delta_is_plain_pytorchs(training, make, rows):
    one = client(rows, training=training)
    steps = batches(3)
    update = one.observe(steps)
    assert (update.kind, update.local_steps, update.training) == ("delta", 3, training)
    for name, value in by_hand(one.model, steps, make).items():
        assert torch.allclose(update.tensors[name], value, rtol=1e-6, atol=1e-12), name


def test_the_model_is_left_as_it_was_found():
    one = client([{"layers": "all", "clip": 1.0, "noise": 1.0}])
    before = {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in one.model.named_parameters()}
    one.observe(batches(2))
    for name, p in one.model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert (p.requires_grad, p.grad) == before[name][1:]


def test_one_sgd_step_is_the_gradient_message_times_the_learning_rate():
    rows = [{"layers": "all", "clip": 0.1, "noise": 0.5}]
    gradient = client(rows, seed=4).observe(batches(1)[0])
    delta = client(rows, seed=4, training=LocalTraining(learning_rate=0.2)).observe(batches(1))
    for name, value in gradient.tensors.items():
        assert torch.allclose(delta.tensors[name], -0.2 * value, rtol=1e-6, atol=1e-12)


def test_noise_of_every_step_ends_up_in_the_delta():
    rows = [{"layers": "all", "clip": 1e-6, "noise": 1e6}]  # the clipped signal is nothing beside a noise of 1
    update = client(rows, training=LocalTraining(learning_rate=0.1), batch_size=2).observe(batches(4))
    drawn = torch.cat([v.flatten() for v in update.tensors.values()])
    assert float(drawn.std()) == pytest.approx(0.1 * math.sqrt(4) / 2, rel=0.05)


def test_a_whole_update_is_clipped_once_and_noised_once():
    rows = [{"layers": "all", "clip": 0.01, "unit": "update"}]
    update = client(rows, training=LocalTraining(learning_rate=0.5)).observe(batches(3))
    assert float(torch.stack([v.norm() for v in update.tensors.values()]).norm()) == pytest.approx(0.01, rel=1e-6)
    noisy = client([{**rows[0], "noise": 3.0}], training=LocalTraining(learning_rate=0.5)).observe(batches(3))
    drawn = torch.cat([v.flatten() for v in noisy.tensors.values()])
    assert float(drawn.std()) == pytest.approx(0.03, rel=0.05)
    made = client([{**rows[0], "noise": 3.0}])
    claim = guarantee(made.plan, sampling_rate=0.1, steps=1, delta=1e-5)
    assert claim.unit == "client"
    assert claim.sigma_eff == pytest.approx(3.0)


def test_an_update_with_layers_at_home_is_clipped_over_what_leaves():
    rows = [{"layers": "all", "clip": 0.01, "unit": "update"}, {"layers": "embeddings", "share": False}]
    sent = client(rows, training=LocalTraining(learning_rate=1.0)).observe(batches(3)).tensors
    assert not any("embeddings" in name for name in sent)
    assert float(torch.stack([v.norm() for v in sent.values()]).norm()) == pytest.approx(0.01, rel=1e-5)


def test_release_operations_act_on_the_delta_after_its_noise():
    rows = [{"layers": "all", "clip": 1.0, "noise": 0.1, "keep": 0.1}]
    update = client(rows).observe(batches(2))
    for name, value in update.tensors.items():
        assert int((value != 0).sum()) <= math.ceil(0.1 * value.numel()), name


def test_withheld_layers_go_on_from_where_they_were_and_never_leave():
    rows = [{"layers": "all", "clip": 1e9}, {"layers": "block[0]", "share": False}]
    one = client(rows, training=LocalTraining(learning_rate=0.1))
    steps = batches(4)
    first, second = one.observe(steps[:2]), one.observe(steps[2:])
    assert not any("layer.0." in name for name in first.tensors)
    model = copy.deepcopy(one.model)
    home = set(one.plan.withheld)
    assert set(one.state.personal) == home
    by_round = by_hand(model, steps[:2], lambda p: torch.optim.SGD(p, lr=0.1))
    with torch.no_grad():  # the server kept its weights; the client kept its own block 0
        for name, p in model.named_parameters():
            if name in home:
                p.add_(by_round[name])
    after = by_hand(model, steps[2:], lambda p: torch.optim.SGD(p, lr=0.1))
    for name, value in second.tensors.items():
        assert torch.allclose(value, after[name], rtol=1e-6, atol=1e-12), name


def test_kept_moments_make_two_rounds_one_training():
    training = LocalTraining("adam", 1e-3, keep_state=True)
    one = client(OPEN, training=training)
    start = copy.deepcopy(one.model)
    steps = batches(4)
    total = {name: torch.zeros_like(p) for name, p in one.model.named_parameters()}
    for part in (steps[:2], steps[2:]):
        update = one.observe(part)
        with torch.no_grad():
            for name, p in one.model.named_parameters():
                p.add_(update.tensors[name])
                total[name] += update.tensors[name]
    for name, value in by_hand(start, steps, lambda p: torch.optim.Adam(p, lr=1e-3)).items():
        assert torch.allclose(total[name], value, rtol=1e-6, atol=1e-12), name


def test_error_feedback_sends_later_what_pruning_left_out():
    rows = [{"layers": "all", "clip": 1e9, "keep": 0.2}]
    one = client(rows, training=LocalTraining(error_feedback=True, learning_rate=0.1))
    open_one = client([{"layers": "all", "clip": 1e9}], training=LocalTraining(learning_rate=0.1))
    sent = [one.observe(batches(1)) for _ in range(2)]
    whole = open_one.observe(batches(1))
    for name, value in whole.tensors.items():
        got = sent[0].tensors[name] + sent[1].tensors[name] + one.state.residual[name]
        assert torch.allclose(got, 2 * value, rtol=1e-9, atol=1e-14), name


def test_the_aggregate_is_the_plain_mean():
    rows = [{"layers": "all", "clip": 0.1, "noise": 1.0}]
    updates = [client(rows, seed=k).observe(batches(1)[0]) for k in range(3)]
    mean = aggregate(updates)
    assert mean.clients == 3
    for name, value in mean.tensors.items():
        assert torch.allclose(value, sum(u.tensors[name] for u in updates) / 3, rtol=1e-12)
    assert aggregate([mean, mean]).clients == 6


def test_an_aggregate_of_aggregates_counts_every_client_once():
    """In secure aggregation by groups a group of two is no more than two clients."""
    one, two, three = (Update({"w": torch.tensor([x])}, 4) for x in (0.0, 0.0, 9.0))
    mean = aggregate([aggregate([one, two]), three])
    assert (mean.tensors["w"].item(), mean.clients) == (3.0, 3)


def test_updates_that_do_not_belong_together_have_no_mean():
    a, b = Update({"w": torch.ones(2)}, 4), Update({"w": torch.ones(2)}, 8)
    with pytest.raises(UserError, match="update 2 is of another kind"):
        aggregate([a, b])
    with pytest.raises(UserError, match="update 2 holds other tensors"):
        aggregate([a, Update({"v": torch.ones(2)}, 4)])
    with pytest.raises(UserError, match="got no update"):
        aggregate([])


def test_the_ledger_counts_every_noised_step_and_halts_before_the_budget():
    rows = [{"layers": "all", "clip": 1.0, "noise": 4.0}]
    ledger = Ledger("ward 3", "model", delta=1e-5, budget=3.0)
    one = client(rows, ledger=ledger)
    fitting = int(ledger.left(one._mechanism))
    assert fitting > 4
    one.observe(batches(3))
    assert ledger.messages == 3
    one.observe(batches(1)[0])
    assert ledger.messages == 4
    with pytest.raises(BudgetSpent, match="above its budget of 3; 4 messages are spent"):
        one.observe(batches(fitting))
    assert ledger.messages == 4
    for _ in range(fitting - 4):
        one.observe(batches(1)[0])
    claim = guarantee(one.plan, sampling_rate=1.0, steps=fitting, delta=1e-5)
    assert ledger.epsilon() == pytest.approx(claim.epsilon)
    with pytest.raises(BudgetSpent, match="above its budget of 3"):
        one.observe(batches(1)[0])


def test_a_whole_update_counts_as_one_message():
    ledger = Ledger("ward 3", "model", delta=1e-5, budget=30.0)
    client([{"layers": "all", "clip": 1.0, "noise": 1.0, "unit": "update"}], ledger=ledger).observe(batches(3))
    assert ledger.messages == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"learning_rate": 0}, "learning_rate is 0; expected a number above 0"),
        ({"momentum": 2}, "momentum is 2; expected a number at least 0 and at most 1"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum is 0.9 with optimizer 'adam'"),
    ],
)
def test_mistakes_in_local_training(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        LocalTraining(**arguments)


def test_no_batch_is_no_local_training():
    with pytest.raises(UserError, match="an empty list of batches"):
        client(OPEN).observe([])
