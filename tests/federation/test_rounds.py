"""The rounds: one client is central training, nothing that stays at home is touched, and seeds decide everything."""

from __future__ import annotations

import math

import pytest
import torch

from dpguard.engine.accounting import guarantee
from dpguard.engine.local import LocalState
from dpguard.errors import UserError
from dpguard.federation import views, worth
from dpguard.federation.settings import Settings, rounds_of, who_takes_part
from dpguard.federation.turn import client_batches, one_client_round
from dpguard.inputs.texts import Example
from dpguard.measure import utility
from dpguard.policy.ledger import Ledger
from tests import tiny
from tests.federation import small


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("server", ["fedsgd", "fedavg"])
@pytest.mark.parametrize("rows", [small.CLIPPED, [{"layers": "all", "clip": 0.5}, {"layers": "norms", "train": False}]])
def test_a_federation_of_one_client_is_central_training_step_by_step(server, rows):
    seen = []
    made, plan, _settings, run = small.run(
        rows, count=6, clients=1, per_round=1, rounds=4, batch_size=6, learning_rate=5.0, server=server,
        on_weights=lambda round_, weights, states: seen.append(weights),
    )  # fmt: skip
    central, steps = small.model(), []
    utility.train(
        central, tiny.tokenizer(), small.texts(6), plan, epochs=4, batch_size=6, learning_rate=5.0, optimizer="sgd",
        on_step=lambda done, total: steps.append(copied(central)),
    )  # fmt: skip
    assert len(steps) == 4
    moved = 0.0
    for ours, theirs, before in zip([*seen[1:], run.weights], steps, seen, strict=True):
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, atol=1e-6), name
            moved += float((value - before[name]).abs().sum())
    assert moved > 1
    assert all(torch.equal(p, run.weights[name]) for name, p in made.named_parameters())


@pytest.mark.parametrize("server", ["fedsgd", "fedavg", "fedadam"])
def test_withheld_layers_stay_at_home_and_the_global_model_keeps_its_own(server):
    rows = [{"layers": "all", "clip": 0.5, "noise": 0.1}, {"layers": ["embeddings", "head"], "share": False}]
    before = copied(small.model())
    made, plan, settings, run = small.run(rows, server=server, rounds=4, learning_rate=0.5)
    assert set(run.weights) == set(before)
    for name in plan.withheld:
        assert torch.equal(run.weights[name], before[name]), name
        assert torch.equal(dict(made.named_parameters())[name], before[name])
    assert all(not torch.equal(run.weights[name], before[name]) for name in plan.shared)
    for state, taken in zip(run.states, run.taken, strict=True):
        assert set(state.personal) == (set(plan.withheld) if taken else set())
    own = [state.personal["classifier.weight"] for state in run.states if state.personal]
    assert len(own) > 1
    assert not torch.equal(own[0], own[1])
    assert settings.rounds * settings.per_round == sum(run.taken)


def test_frozen_layers_do_not_move_and_make_the_claim_finite():
    rows = [{"layers": "all", "clip": 0.5, "noise": 1.0}, {"layers": "head", "share": False, "noise": 0}]
    _model, plan, settings, run = small.run(rows, personal="frozen", rounds=4)
    assert all(not state.personal for state in run.states)
    assert max(run.epsilons()) < math.inf
    _model, _plan, trained, home = small.run(rows, personal="trained", rounds=4)
    assert max(home.epsilons()) == math.inf
    sizes, seeds = [6] * 4, [0]
    assert views.promise(plan, settings, sizes, seeds=seeds, delta=1e-5).guarantee.formal
    told = views.promise(plan, trained, sizes, seeds=seeds, delta=1e-5).guarantee
    assert not told.formal
    assert "withheld layers train without noise" in told.statement


@pytest.mark.parametrize("more", [{}, {"local_steps": 2}, {"rounds": 2}])
@pytest.mark.parametrize("head", [{"noise": 0}, {"noise": 0.1}])
def test_layers_at_home_feed_no_message_of_a_client_that_sends_one(head, more):
    rows = [{"layers": "all", "clip": 0.5, "noise": 1.0}, {"layers": "head", "share": False, **head}]
    _model, plan, settings, run = small.run(rows, **{"clients": 2, "rounds": 1, **more})
    told = views.promise(plan, settings, [12] * 2, seeds=[0], delta=1e-5)
    assert max(run.epsilons()) == pytest.approx(told.guarantee.epsilon)
    assert (max(run.epsilons()) < math.inf) == (not more or head["noise"] > 0)


def test_a_withheld_layer_goes_on_from_where_it_was():
    made = small.model()
    plan = small.plan([{"layers": "all", "clip": 0.5}, {"layers": "head", "share": False}], made)
    train, state = small.texts(6), LocalState()
    settings = Settings(clients=1, per_round=1, rounds=9, server="fedsgd", batch_size=6, learning_rate=0.5)
    name, path = "classifier.weight", []
    for round_ in (1, 2, 3):
        one_client_round(
            made, plan, train, settings,
            tokenizer=tiny.tokenizer(), seed=0, client=0, round_=round_, state=state,
        )  # fmt: skip
        path.append(state.personal[name])
    by_hand = small.model()
    only_head = small.plan([{"layers": "all", "clip": 0.5}], by_hand)
    delta = Settings(clients=1, per_round=1, rounds=9, batch_size=6, learning_rate=0.5)
    first = one_client_round(
        by_hand, only_head, train, delta, tokenizer=tiny.tokenizer(), seed=0, client=0, round_=1, state=LocalState()
    )
    assert torch.allclose(path[0], dict(by_hand.named_parameters())[name] + first.tensors[name], atol=1e-6)
    assert not torch.equal(path[0], path[1])
    assert not torch.equal(path[1], path[2])


def test_every_client_has_a_ledger_of_its_own():
    rows = [{"layers": "all", "clip": 0.5, "noise": 1.0}]
    _model, plan, settings, run = small.run(rows, clients=5, per_round=2, rounds=3, local_steps=2, count=22)
    assert list(run.taken) == rounds_of(settings, 0)
    sizes = [5, 5, 4, 4, 4]
    for size, taken, found in zip(sizes, run.taken, run.epsilons(), strict=True):
        expected = guarantee(plan, sampling_rate=3 / size, steps=2 * taken, delta=1e-5).epsilon if taken else 0.0
        assert found == pytest.approx(expected)
    assert 0.0 in run.epsilons() or min(run.taken) > 0
    assert len(set(run.epsilons())) > 1
    promised = views.promise(plan, settings, sizes, seeds=[0], delta=1e-5)
    assert promised.guarantee.epsilon == pytest.approx(max(run.epsilons()))


def test_the_ledger_is_entered_before_a_message_is_made(monkeypatch):
    order = []
    spend = Ledger.spend
    monkeypatch.setattr(Ledger, "spend", lambda self, *a, **k: (order.append("spent"), spend(self, *a, **k))[1])

    def turn(*arguments, **more):
        order.append("made")
        return one_client_round(*arguments, **more)

    monkeypatch.setattr("dpguard.federation.rounds.one_client_round", turn)
    small.run(small.NOISED, rounds=2)
    assert order == ["spent", "made"] * 4


@pytest.mark.parametrize(
    "more", [{}, {"view": "aggregate"}, {"server": "fedsgd"}, {"server": "fedadam", "local_steps": 2}]
)
def test_one_seed_gives_one_result(more):
    first, again, other = (small.run(small.NOISED, seed=seed, **more)[3] for seed in (3, 3, 4))
    assert first.bytes == again.bytes
    for name, value in first.weights.items():
        assert torch.equal(value, again.weights[name])
    assert any(not torch.equal(value, other.weights[name]) for name, value in first.weights.items())


def test_a_turn_depends_on_nothing_but_its_arguments():
    """What lets a client on another machine send the same tensors."""
    made = small.model()
    plan = small.plan(small.NOISED, made)
    settings = Settings(clients=4, per_round=2, rounds=3, batch_size=3, local_steps=2)

    def turn(seed):
        torch.manual_seed(torch.randint(1000, (1,)).item())
        return one_client_round(
            made, plan, small.texts(8), settings,
            tokenizer=tiny.tokenizer(), seed=seed, client=2, round_=3, state=LocalState(),
        )  # fmt: skip

    one, two, secret, hidden = turn(0), turn(0), turn(None), turn(None)
    name = "classifier.weight"
    assert torch.equal(one.tensors[name], two.tensors[name])
    assert not torch.equal(secret.tensors[name], hidden.tensors[name])


def test_batches_follow_their_coins():
    drawn = [client_batches(5, c, r, examples=40, batch_size=8, steps=3) for c in range(20) for r in range(1, 11)]
    assert drawn[0] == client_batches(5, 0, 1, examples=40, batch_size=8, steps=3)
    assert drawn[0] != client_batches(5, 1, 1, examples=40, batch_size=8, steps=3)
    sizes = [len(batch) for batches in drawn for batch in batches]
    mean = sum(sizes) / len(sizes)
    assert abs(mean - 8) < 5 * math.sqrt(40 * 0.2 * 0.8 / len(sizes))
    assert len(set(sizes)) > 5


def test_everybody_takes_part_about_equally_often():
    counts = [0] * 20
    for round_ in range(1, 401):
        chosen = who_takes_part(7, round_, clients=20, per_round=10)
        assert len(set(chosen)) == 10
        for client in chosen:
            counts[client] += 1
    assert max(abs(count - 200) for count in counts) < 50


def test_what_no_federation_can_run_is_refused():
    with pytest.raises(UserError, match="follows a quantile"):
        small.run([{"layers": "all", "clip": {"quantile": 0.5}, "noise": 1.0}])
    with pytest.raises(UserError, match="shares nothing"):
        small.run([{"layers": "all", "share": False}])


@pytest.mark.parametrize(
    "rows",
    [
        [{"layers": "all", "clip": 0.5, "noise": 0.3, "keep": 0.1}],
        [{"layers": "all", "clip": 0.5, "noise": 0.3, "keep": 0.1, "prune": "random"}],
        [{"layers": "all", "clip": 0.5, "bits": 8}],
        [{"layers": "all", "noise_std": 0.01}],
        [{"layers": "all", "clip": 0.5, "noise": 0.3, "unit": "update"}],
        [{"layers": "all", "clip": 0.5, "noise": 0.3, "per": "block", "mode": "normalise"}],
        [{"layers": ["block[0]", "norms"], "train": False}],
    ],
)
@pytest.mark.parametrize(
    "more",
    [
        {"view": "aggregate", "server": "fedsgd"},
        {"local_steps": 2, "momentum": 0.9, "keep_state": True, "error_feedback": True},
        {"optimizer": "adam", "learning_rate": 1e-3, "keep_state": True, "weights": "size"},
    ],
)
def test_every_policy_trains(rows, more):
    _model, plan, settings, run = small.run(rows, rounds=3, **more)
    assert all(bool(value.isfinite().all()) for value in run.weights.values())
    told = views.promise(plan, settings, [6] * 4, seeds=[0], delta=1e-5)
    assert told.guarantee.epsilon == pytest.approx(max(run.epsilons()))
    assert told.guarantee.statement


def test_personal_models_are_judged_on_their_own_texts():
    rows = [{"layers": "all", "clip": 0.5}, {"layers": "head", "share": False}]
    made, _plan, settings, run = small.run(rows, rounds=3, learning_rate=0.5)
    test = small.texts(11, seed=5)
    parts = ((0, 1, 2), (3, 4), (), (5, 6, 7, 8, 9, 10))
    before = copied(made)
    found = worth.judge(made, tiny.tokenizer(), test, parts, run.states)
    assert found.clients == 3
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())
    accuracies = []
    for part, state in zip(parts, run.states, strict=True):
        if part:
            with torch.no_grad():
                for name, value in state.personal.items():
                    dict(made.named_parameters())[name].copy_(value)
            own, _loss = utility.predict(made, tiny.tokenizer(), [test[i] for i in part])
            assert [found.predictions[i] for i in part] == own
            accuracies.append(sum(test[i].label == p for i, p in zip(part, own, strict=True)) / len(part))
            with torch.no_grad():
                for name, value in before.items():
                    dict(made.named_parameters())[name].copy_(value)
    assert found.mean["accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert found.worst_tenth["accuracy"] == pytest.approx(min(accuracies))
    assert settings.clients == 4


def test_the_commonest_label_of_each_client_is_counted_on_its_own_held_out_texts():
    train = [Example("t", label) for label in (0, 0, 1, 1, 1, 0, 1)]
    test = [Example("t", label) for label in (0, 1, 1, 0)]
    own = ((0, 1, 2), (3, 4), (5, 6))  # answers 0, 1, and of equally many the lower label: 0
    assert worth.commonest(train, own, test, ((0, 1), (2,), (3,))) == 3 / 4
    assert worth.commonest(train, own, test, ((), (0, 1, 2, 3), ())) == 2 / 4
