"""Checks one by one: samplers with a bug, claims with a bug, and the model's own row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpguard.engine import accounting, noise, wire
from dpguard.engine.audit import claims, on_model, quantiles, release, sampling, source
from dpguard.engine.audit.noise import measure
from dpguard.engine.audit.run import audit
from dpguard.engine.audit.subject import Subject, only, shrunk
from dpguard.engine.client import Client
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.audit import planted
from tests.engine.audit.test_run import PLANS, SLOTS, letters


def failing(rows):
    return {row.what for row in rows if row.verdict == "fail"}


def shuffled(examples, batch_size, generator):
    """Fixed batches of a shuffled pass."""
    order = torch.randperm(examples, generator=generator)
    return [part.tolist() for part in order.split(batch_size)]


def in_pairs(examples, batch_size, generator):
    """One coin for every two examples."""
    for _ in range(examples // batch_size):
        coins = torch.rand(examples // 2, generator=generator) < batch_size / examples
        yield coins.repeat_interleave(2).nonzero()[:, 0].tolist()


def favourites(examples, batch_size, generator):
    """The right rate on the whole, but half of the examples are drawn more often."""
    rate = torch.full((examples,), batch_size / examples)
    rate[::2] *= 1.2
    rate[1::2] *= 0.8
    for _ in range(examples // batch_size):
        yield (torch.rand(examples, generator=generator) < rate).nonzero()[:, 0].tolist()


def poisson(rate):
    def sampler(examples, batch_size, generator):
        for _ in range(examples // batch_size):
            yield (torch.rand(examples, generator=generator) < rate).nonzero()[:, 0].tolist()

    return sampler


def stale_coins(examples, batch_size, generator):
    """Every second batch is the one before."""
    for _ in range(examples // batch_size // 2):
        batch = (torch.rand(examples, generator=generator) < batch_size / examples).nonzero()[:, 0].tolist()
        yield batch
        yield batch


@pytest.mark.parametrize(
    ("sampler", "what"),
    [
        (shuffled, "size of 800 batches"),
        (in_pairs, "two examples in one batch"),
        (poisson(0.105), "sampling rate"),
        (favourites, "how often each of 400 is drawn"),
        (stale_coins, "two batches"),
    ],
)
def test_a_wrong_sampler_is_caught(sampler, what):
    assert what in failing(sampling.check(0, sampler))


def test_the_engine_samples_by_independent_coins():
    for seed in range(20):
        assert not failing(sampling.check(seed)), seed


@pytest.fixture
def judged(monkeypatch):
    """Rows of check A when the claim is changed by a function of the true one."""

    def run(name, change):
        def wrong(plan, **arguments):
            found = accounting.guarantee(plan, **arguments)
            return change(found, plan) if found.formal else found

        monkeypatch.setattr(claims, "guarantee", wrong)
        subject = Subject(Policy(PLANS[name]).plan(SLOTS), 8)
        return failing(claims.check(subject, measure(subject)))

    return run


def test_sigma_of_the_mean_layer_is_caught(judged):
    wrong = judged("role", lambda found, plan: replace(found, sigma_eff=1.0))
    assert {"sigma_eff of one message", "sigma_eff of a later message", "sigma_eff as measured"} <= wrong


def test_epsilon_too_small_is_caught(judged):
    wrong = judged("flat", lambda found, plan: replace(found, epsilon=found.epsilon * 0.99))
    assert "epsilon of one message, q = 1" in wrong
    pytest.importorskip("dp_accounting")
    assert "epsilon of 100 messages, q = 0.01" in wrong


def test_epsilon_off_by_a_billionth_is_caught(judged):
    assert "epsilon of one message, q = 1" in judged(
        "flat", lambda found, plan: replace(found, epsilon=found.epsilon * (1 + 5e-9))
    )


def test_a_finite_claim_for_clean_layers_is_caught(monkeypatch):
    formal = accounting.guarantee(Policy(PLANS["flat"]).plan(SLOTS), sampling_rate=1.0, steps=1, delta=1e-5)
    monkeypatch.setattr(claims, "guarantee", lambda plan, **_: formal)
    for name in ("clip-only", "partly noised", "flat"):
        subject = Subject(Policy(PLANS[name]).plan(SLOTS), 8)
        assert failing(claims.check(subject, measure(subject))), name


def test_the_accountant_row_says_why_it_is_skipped(monkeypatch):
    monkeypatch.setattr(claims.importlib.util, "find_spec", lambda name: None)
    subject = Subject(Policy(PLANS["flat"]).plan(SLOTS), 8)
    (row,) = [r for r in claims.check(subject, measure(subject)) if r.what.startswith("epsilon of 100")]
    assert row.verdict == "not applicable"
    assert row.figure == "dp-accounting is not installed"


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 3.0, 10.0, 40.0, 300.0])
def test_the_tail_integral_agrees_with_the_closed_form(mu):
    from dpguard.policy import gaussian

    row = claims._closed_form(1 / mu, gaussian.epsilon_of(mu, claims.DELTA))
    assert row.verdict == "pass", row


def test_small_plans_keep_groups_and_rules():
    plan = Policy(PLANS["role"]).plan(SLOTS)
    small = shrunk(plan, 16)
    assert max(rule.slot.size for rule in small.values()) <= 16
    assert {key: group.names for key, group in small.groups.items()} == {k: g.names for k, g in plan.groups.items()}
    assert set(only(plan, ["classifier.bias"])) == {"classifier.bias"}
    assert all(replace(rule, slot=plan[name].slot) == plan[name] for name, rule in small.items())


def test_every_group_gets_the_draws_that_five_per_cent_needs():
    measured = measure(Subject(Policy([{"layers": "all", "clip": 1.0, "noise": 1.0, "per": "tensor"}]).plan(SLOTS), 8))
    assert all(measured.pooled(found).count >= 18_000 for found in measured.classes)
    assert {"classifier.bias", "bert.pooler.dense.bias"} <= set(measured.tensors)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", ["block", "withheld in the clear", "none", "clip-only", "noise_std"])
def test_a_model_passes(family, name):
    loaded = tiny.loaded(family, width=16, blocks=2)
    report = audit(Policy(PLANS[name]), model=loaded)
    assert report.ok, report.failed
    assert any("no text through the model" in row.what for row in report.rows)
    assert any("real texts" in row.what for row in report.rows) == (
        name in ("block", "withheld in the clear", "clip-only")
    )


def test_a_client_that_forgets_to_clip_is_caught(monkeypatch):
    loaded = tiny.loaded("bert", width=16, blocks=2)
    plan = Policy([{"layers": "all", "clip": 1e-3, "noise": 1.0}]).plan(slots(loaded.module))
    whole = Client.clipped
    rules = {name: replace(rule, clip=1e6) for name, rule in plan.rules.items()}
    monkeypatch.setattr(Client, "clipped", lambda self, batch: whole(_with(self, replace(plan, rules=rules)), batch))
    rows = [row for step in on_model.steps(loaded, plan, batch_size=8, seed=0) for row in step()]
    assert {row.check for row in rows if row.verdict == "fail"} == {"S"}


def _with(client, plan):
    return Client(client.model, plan, seed=0, batch_size=client.batch_size)


def test_a_client_whose_noise_repeats_is_caught(monkeypatch):
    loaded = tiny.loaded("bert", width=16, blocks=2)
    plan = Policy(PLANS["flat"]).plan(slots(loaded.module))
    whole = Client.message
    monkeypatch.setattr(
        Client, "message", lambda self, batch, _generator: whole(self, batch, torch.Generator().manual_seed(1))
    )
    rows = [row for step in on_model.steps(loaded, plan, batch_size=8, seed=0) for row in step()]
    assert {row.check for row in rows if row.verdict == "fail"} == {"N"}
    assert letters(audit(plan)) == set()


def test_a_client_that_keeps_the_last_sum_is_caught(monkeypatch):
    loaded = tiny.loaded("bert", width=16, blocks=2)
    plan = Policy(PLANS["block"]).plan(slots(loaded.module))
    whole, last = Client.clipped, {}

    def stale(self, batch):
        found = whole(self, batch)
        before = last.get(id(self), found.sums)
        last[id(self)] = found.sums
        return replace(found, sums={n: 0.5 * (s + before[n]) for n, s in found.sums.items()})

    monkeypatch.setattr(Client, "clipped", stale)
    rows = [row for step in on_model.steps(loaded, plan, batch_size=8, seed=0) for row in step()]
    assert "3 rounds of one client, text only in the first" in failing(rows)


@pytest.fixture
def quantile():
    return Subject(Policy(PLANS["quantile"]).plan(SLOTS), 8)


@pytest.mark.parametrize(("change", "letter"), [("noise", "N"), ("reach", "S")])
def test_a_wrong_noised_count_is_caught(quantile, monkeypatch, change, letter):
    whole = wire.next_clips

    def wrong(norms, plan, generator, *, batch_size):
        if change == "reach":  # an example counts 0 or 1, not -1/2 or 1/2
            count = len(next(iter(norms.values())))
            found = whole(norms, plan, generator, batch_size=batch_size)
            return {
                key: c * math.exp(-plan.groups[key].quantile.rate * count / 2 / batch_size) for key, c in found.items()
            }
        rules = {
            name: replace(rule, quantile=replace(rule.quantile, count_noise=0.8 * rule.quantile.count_noise))
            for name, rule in plan.items()
        }
        return whole(norms, replace(plan, rules=rules), generator, batch_size=batch_size)

    monkeypatch.setattr(wire, "next_clips", wrong)
    assert {row.check for row in quantiles.check(quantile) if row.verdict == "fail"} == {letter}


def test_the_noised_counts_of_the_engine_pass(quantile):
    rows = quantiles.check(quantile)
    assert len(rows) == 2
    assert not failing(rows)


@pytest.mark.parametrize("bug", [lambda z: 0.98 * z, lambda z: 2 * z.sign(), lambda z: z[: len(z) // 2].repeat(2)])
def test_a_wrong_source_without_a_seed_is_caught(monkeypatch, bug):
    whole = noise.add_noise_
    monkeypatch.setattr(noise, "add_noise_", lambda value, std, drawn_from: bug(whole(value, std, drawn_from)))
    assert len(failing(source.check())) == 2


def test_the_source_without_a_seed_passes():
    assert not failing(source.check())


def test_a_registered_release_that_looks_at_the_clean_sum_is_caught():
    plan = Policy(PLANS["flat"]).plan(SLOTS)
    rules = {name: replace(rule, release=(("quantise", 4),)) for name, rule in plan.items()}
    subject = Subject(replace(plan, rules=rules), 8)
    assert not failing(release.check(subject))
    assert failing(release.check(replace(subject, build=planted.LeakedMaskOnTheWire)))
