"""Two views, one claim: what the server sees carries the noise that its guarantee counts."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2

from dpguard.engine.accounting import guarantee
from dpguard.engine.client import Client
from dpguard.engine.local import LocalState, LocalTraining
from dpguard.errors import UserError
from dpguard.federation import views
from dpguard.federation.leak import FederatedThreat
from dpguard.federation.server import mean_update
from dpguard.federation.settings import Settings
from dpguard.federation.turn import one_client_round
from dpguard.inputs.batch import collate
from dpguard.measure import leakage
from dpguard.measure.threat import Threat
from tests import tiny
from tests.federation import small

BARE = [{"layers": "all", "clip": 1e-6, "noise": 1e6}]
"""A signal of nothing beside noise of std 1 on the sum."""


def settings(**more):
    return Settings(**{"clients": 8, "per_round": 5, "rounds": 4, "batch_size": 4, "learning_rate": 0.5, **more})


def within(values, std):
    """Whether values are Gaussian of this std, by chi-square at one in a million."""
    squares, count = float((torch.cat(values).double() / std).pow(2).sum()), sum(v.numel() for v in values)
    return chi2.ppf(1e-6, count) < squares < chi2.isf(1e-6, count)


@pytest.mark.parametrize(
    ("more", "scale"),
    [
        # every client's message: the whole noise, so the mean has it divided by sqrt(n)
        ({"server": "fedsgd"}, 1 / 4 / math.sqrt(5)),
        ({}, 0.5 / 4 / math.sqrt(5)),
        # the sum over 5 clients has the noise of one, and the mean a fifth of that
        ({"server": "fedsgd", "view": "aggregate"}, 1 / 4 / 5),
        ({"view": "aggregate"}, 0.5 / 4 / 5),
        # any 3 of 5 shares make up the noise of one
        ({"view": "aggregate", "may_fail": 2}, 0.5 / 4 / 5 * math.sqrt(5 / 3)),
    ],
)
def test_noise_of_the_mean_that_the_server_sees(more, scale):
    chosen, made = settings(**more), small.model()
    own = views.message_plan(small.plan(BARE, made), chosen)
    sent = [
        one_client_round(
            made,
            own,
            small.texts(12),
            chosen,
            tokenizer=tiny.tokenizer(),
            seed=0,
            client=client,
            round_=1,
            state=LocalState(),
        )
        for client in range(5)
    ]
    mean = [value.flatten() for value in mean_update(sent).tensors.values()]
    assert within(mean, scale)
    assert not within(mean, scale * 1.05)
    assert not within(mean, scale * 0.95)


def test_shares_that_are_left_carry_the_claim():
    """With as many clients failing as may, what the others add is the noise of the table, to the entry."""
    chosen, made = settings(view="aggregate", may_fail=2), small.model()
    plan = small.plan(small.NOISED, made)
    own = views.message_plan(plan, chosen)
    for name in plan.shared:
        assert 3 * own[name].std(4) ** 2 == pytest.approx(plan[name].std(4) ** 2)


def test_what_is_never_summed_keeps_the_whole_noise():
    rows = [{"layers": "all", "clip": 1.0, "noise": 2.0}, {"layers": "head", "share": False}]
    plan = small.plan(rows, small.model())
    own = views.message_plan(plan, settings(view="aggregate"))
    assert all(own[name].noise == 2.0 for name in plan.withheld)
    assert all(own[name].noise == pytest.approx(2 / math.sqrt(5)) for name in plan.shared)


@pytest.mark.parametrize(
    ("rows", "more", "alone"),
    [
        ({}, {}, False),
        ({}, {"server": "fedsgd"}, False),
        ({}, {"local_steps": 2}, True),
        ({}, {"optimizer": "adam"}, True),
        ({}, {"momentum": 0.5}, False),
        ({}, {"momentum": 0.5, "keep_state": True}, True),
        ({}, {"error_feedback": True}, True),
        ({"keep": 0.5}, {}, True),
        ({"keep": 0.5, "prune": "random"}, {}, False),
        ({"bits": 8}, {}, True),
        ({"unit": "update"}, {"local_steps": 9, "optimizer": "adam", "keep_state": True}, False),
        ({"unit": "update", "bits": 8}, {}, True),
    ],
)
def test_where_the_others_noise_hides_a_message(rows, more, alone):
    plan = small.plan([{"layers": "all", "clip": 1.0, "noise": 1.0, **rows}], small.model())
    chosen = settings(view="aggregate", **more)
    assert bool(views.own_share_only(plan, chosen)) == alone
    told = views.promise(plan, chosen, [12] * 8, seeds=[0, 1], delta=1e-5)
    assert told.guarantee.sigma_eff == pytest.approx(1 / math.sqrt(5) if alone else 1.0)
    assert ("Only the client's own share is counted" in told.guarantee.statement) == alone
    assert "secure aggregation is assumed" in told.guarantee.statement
    assert ("none of the clients may drop out or collude" in told.guarantee.statement) != alone
    local = views.promise(plan, settings(**more), [12] * 8, seeds=[0, 1], delta=1e-5).guarantee
    assert local.sigma_eff == pytest.approx(1.0)
    assert "every message of every client" in local.statement
    assert (told.guarantee.epsilon == pytest.approx(local.epsilon)) != alone


def test_local_steps_move_the_sum_by_more_than_their_clips():
    """Why the others' noise does not count there: later gradients are taken at weights that one example moved."""
    made = small.model().double()
    plan = small.plan([{"layers": "all", "clip": 1.0}], made)
    texts = small.texts(6)
    batch = collate([e.text for e in texts], [e.label for e in texts], tiny.tokenizer())

    def change(steps, last):
        client = Client(made, plan, seed=0, batch_size=6, training=LocalTraining(learning_rate=100.0))
        sent = client.observe([batch.rows(slice(0, last))] * steps)
        return torch.cat([value.flatten() for value in sent.tensors.values()]) * 6 / 100

    assert float((change(1, 6) - change(1, 5)).norm()) <= 1 + 1e-6
    assert float((change(3, 6) - change(3, 5)).norm()) > 3 * 1.3


def test_the_promise_is_the_worst_clients_over_all_seeds():
    plan = small.plan(small.NOISED, small.model())
    chosen = settings(clients=4, per_round=2, rounds=5)
    sizes = [40, 12, 8, 30]
    told = views.promise(plan, chosen, sizes, seeds=[0, 1, 2], delta=1e-5)
    each = [
        guarantee(plan, sampling_rate=4 / sizes[k], steps=taken, delta=1e-5).epsilon
        for seed in (0, 1, 2)
        for k, taken in enumerate(views.rounds_of(chosen, seed))
        if taken
    ]
    assert told.guarantee.epsilon == pytest.approx(max(each))
    assert told.examples == sizes[told.client]
    assert f"takes part in {told.rounds} of 5 rounds" in told.guarantee.statement


def test_the_delta_must_do_for_the_largest_client_too():
    """The worst epsilon is a small client's, and a delta that is small for it may promise nothing to the others."""
    plan, chosen = small.plan(small.NOISED, small.model()), settings(clients=2, per_round=2)
    for sizes in ([10, 5000], [5000, 10]):
        with pytest.raises(UserError, match=r"delta is 0.01, larger than 1 / 5000 examples"):
            views.promise(plan, chosen, sizes, seeds=[0], delta=1e-2)
        assert views.promise(plan, chosen, sizes, seeds=[0], delta=2e-4).examples == 10
    whole = small.plan([{"layers": "all", "clip": 1.0, "noise": 1.0, "unit": "update"}], small.model())
    assert views.promise(whole, chosen, [10, 5000], seeds=[0], delta=1e-2).guarantee.unit == "client"


def test_dropping_out_is_told_with_its_price():
    plan = small.plan(small.NOISED, small.model())
    told = views.promise(plan, settings(view="aggregate", may_fail=2), [12] * 8, seeds=[0], delta=1e-5).guarantee
    assert "needs 3 honest shares a round: 2 of the clients may drop out or collude" in told.statement
    alone = guarantee(
        views.message_plan(plan, settings(view="aggregate", may_fail=2)),
        sampling_rate=told.sampling_rate, steps=told.steps, delta=1e-5,
    ).epsilon  # fmt: skip
    assert f"own alone epsilon is {alone:.3g}" in told.statement
    assert alone > told.epsilon


def test_an_attacker_sees_the_federations_own_message():
    loaded = tiny.loaded("bert", width=16, blocks=2)
    plan = small.plan([*small.NOISED, {"layers": "head", "share": False}], loaded.module)
    home = {name: loaded.module.get_parameter(name).detach() + 1 for name in plan.withheld}
    batches = [leakage.encode(loaded, small.texts(2, seed=k)) for k in range(5)]
    gradient = FederatedThreat.within(Threat(), settings(server="fedsgd"), states=[LocalState(personal=home)])
    one = gradient.message(loaded, plan, batches[:1], noise_seed=3)
    assert (one.kind, one.clients, set(one.tensors)) == ("gradient", 1, set(plan.shared))
    elsewhere = FederatedThreat.within(Threat(), settings(server="fedsgd"))
    other = elsewhere.message(loaded, plan, batches[:1], noise_seed=3)
    assert any(not torch.equal(one.tensors[n], other.tensors[n]) for n in plan.shared)
    chosen = settings(view="aggregate", local_steps=3)
    mean = FederatedThreat.within(Threat(know=("labels",)), chosen)
    seen = mean.message(loaded, views.message_plan(plan, chosen), batches, noise_seed=3)
    assert (seen.kind, seen.local_steps, seen.clients) == ("delta", 3, 5)
    assert mean.knows("labels")


@pytest.mark.parametrize("rows", [small.CLIPPED, [{"layers": "all", "clip": 0.01, "unit": "update"}]])
@pytest.mark.parametrize("more", [{"local_steps": 3}, {"local_steps": 3, "optimizer": "adam", "learning_rate": 1e-3}])
def test_what_is_attacked_is_what_a_client_with_these_texts_sends(rows, more):
    loaded, texts = tiny.loaded("bert", width=16, blocks=2, **small.STILL), small.texts(2)
    plan, chosen = small.plan(rows, loaded.module), settings(batch_size=8, **more)
    batch = leakage.encode(loaded, texts)
    seen = FederatedThreat.within(Threat(), chosen).message(loaded, plan, [batch], noise_seed=0)
    sent = one_client_round(
        loaded.module, plan, texts, chosen,
        tokenizer=loaded.tokenizer, seed=0, client=0, round_=1, state=LocalState(),
    )  # fmt: skip
    for name, value in sent.tensors.items():
        assert torch.allclose(seen.tensors[name], value, rtol=1e-3, atol=1e-6), name
    assert max(float(value.abs().max()) for value in sent.tensors.values()) > 1e-4
