"""The defence-effect check catches a defence that is not applied; planted bugs, not readings of the code."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from dpguard.engine import local, noise, wire
from dpguard.engine.client import Client
from dpguard.federation import views
from dpguard.federation.leak import FederatedThreat
from dpguard.federation.settings import Settings
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.measure import defence
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from tests import tiny

MODEL = tiny.module("bert")
BATCH = collate(tiny.SENTENCES, [0, 1, 0], tiny.tokenizer())
POLICIES = {
    "none": [],
    "dp-sgd": [{"layers": "all", "clip": 0.05, "noise": 1.0}],
    "per block": [{"layers": "all", "clip": 0.05, "noise": 1.0, "per": "block"}, {"layers": "head", "noise": 2.0}],
    "uncalibrated": [{"layers": "all", "noise_std": 0.01}],
    "pruned": [{"layers": "all", "clip": 0.05, "noise": 1.0, "keep": 0.1, "bits": 4}],
    "withheld": [{"layers": "all", "clip": 0.05, "noise": 1.0}, {"layers": "embeddings", "share": False}],
}


def client(rows):
    return Client(MODEL, Policy(rows).plan(slots(MODEL)), seed=0)


@pytest.mark.parametrize("name", POLICIES)
def test_the_real_defence_passes_and_is_measured(name):
    found = defence.check(client(POLICIES[name]), BATCH)
    for measured, bound in found.clip.values():
        assert 0 < measured <= bound * 1.001
    for measured, claimed in found.noise.values():
        assert measured == pytest.approx(claimed, rel=0.15)
    if name == "per block":
        assert found.noise["head"][1] == pytest.approx(0.1)


def test_no_clip_is_caught(monkeypatch):
    monkeypatch.setattr(wire, "clip_factors", lambda norms, *_: norms * 0 + 1)
    with pytest.raises(defence.DefenceError, match="above its bound"):
        defence.check(client(POLICIES["per block"]), BATCH)


@pytest.mark.parametrize("factor", [0.9, 0.0, 1.1])
def test_wrong_noise_is_caught(monkeypatch, factor):
    true = wire.noised_tensor

    def wrong(name, total, plan, **more):
        clean = total.clone()
        return clean + factor * (true(name, total, plan, **more) - clean)

    monkeypatch.setattr(wire, "noised_tensor", wrong)
    with pytest.raises(defence.DefenceError, match="the table claims"):
        defence.check(client(POLICIES["dp-sgd"]), BATCH)


def test_one_layer_without_noise_is_caught(monkeypatch):
    true = wire.noised_tensor

    def wrong(name, total, plan, **more):
        return total if name == "bert.pooler.dense.weight" else true(name, total, plan, **more)

    monkeypatch.setattr(wire, "noised_tensor", wrong)
    with pytest.raises(defence.DefenceError, match=r"bert\.pooler\.dense\.weight"):
        defence.check(client(POLICIES["dp-sgd"]), BATCH)


def test_a_withheld_layer_on_the_wire_is_caught(monkeypatch):
    true = wire.emit

    def leaky(clipped, plan, **more):
        for out in true(clipped, plan, **more):
            yield replace(out, wire=out.mean) if "word_embeddings" in out.name else out

    monkeypatch.setattr(wire, "emit", leaky)
    with pytest.raises(defence.DefenceError, match="on the wire"):
        defence.check(client(POLICIES["withheld"]), BATCH)


LOADED = tiny.loaded("bert")
STEPS = {
    "one step": {},
    "many": {"local_steps": 5, "learning_rate": 0.5},
    "momentum": {"local_steps": 4, "momentum": 0.9},
    "adam": {"local_steps": 3, "optimizer": "adam", "learning_rate": 1e-3, "keep_state": True},
    "mean": {"local_steps": 2, "view": "aggregate", "per_round": 3},
}
CHANGED = {**POLICIES, "whole": [{"layers": "all", "clip": 0.05, "noise": 1.0, "unit": "update"}]}
DP_SGD = CHANGED["dp-sgd"]


def judged(rows, **more):
    settings = Settings(**{"clients": 3, "per_round": 1, "rounds": 1, "batch_size": 8, **more})
    plan = views.message_plan(Policy(rows).plan(slots(LOADED.module)), settings)
    threat = FederatedThreat.within(Threat(mode="train"), settings)
    return defence.check_change(threat, LOADED, plan, [BATCH] * settings.summed)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CHANGED)
def test_the_change_after_local_steps_is_measured_too(name, steps):
    found = judged(CHANGED[name], **STEPS[steps])
    assert bool(found.clip) == (name not in ("none", "uncalibrated"))
    assert bool(found.noise) == (name != "none")
    for measured, bound in found.clip.values():
        assert 0 < measured <= bound * 1.001
    for measured, claimed in found.noise.values():
        assert measured == pytest.approx(claimed, rel=0.15)
    assert ("plain SGD" in found.judged) == (steps == "adam")


def test_what_is_claimed_of_a_change_is_what_its_steps_add_up_to():
    # lr * noise * clip / batch * sqrt(1 + 1.5**2): the first of two gradients is felt once more by momentum .5
    found = judged(DP_SGD, local_steps=2, momentum=0.5, learning_rate=0.4)
    assert [claimed for _, claimed in found.noise.values()] == pytest.approx(
        [0.4 * 0.05 / 8 * 3.25**0.5] * len(found.noise)
    )
    threat, plan = Threat(local_steps=4, learning_rate=0.1), Policy(DP_SGD).plan(slots(LOADED.module))
    central = defence.check_change(threat, LOADED, plan, [BATCH])
    assert [claimed for _, claimed in central.noise.values()] == pytest.approx(
        [0.1 * 0.05 / 3 * 2] * len(central.noise)
    )


def noised_by(factor):
    class Wrong:
        wide = staticmethod(noise.wide)

        @staticmethod
        def add_noise_(total, std, drawn_from, divide_by=1):
            return noise.add_noise_(total, factor * std, drawn_from, divide_by=divide_by)

    return Wrong


@pytest.mark.parametrize("factor", [0.9, 0.0, 1.1])
@pytest.mark.parametrize("name", ["dp-sgd", "whole", "uncalibrated"])
@pytest.mark.parametrize("steps", ["one step", "many", "adam"])
def test_wrong_noise_on_local_steps_alone_is_caught(monkeypatch, factor, name, steps):
    monkeypatch.setattr(local, "noise", noised_by(factor))
    with pytest.raises(defence.DefenceError, match="the table claims"):
        judged(CHANGED[name], **STEPS[steps])
    assert defence.check(client(CHANGED[name]), BATCH).noise, "the gradient's own path is sound"


@pytest.mark.parametrize("name", ["dp-sgd", "whole"])
def test_no_clip_on_local_steps_is_caught(monkeypatch, name):
    monkeypatch.setattr(wire, "clip_factors", lambda norms, *_: norms * 0 + 1)
    rows = [{**CHANGED[name][0], "clip": 1e-4}]
    with pytest.raises(defence.DefenceError, match="above its bound"):
        judged(rows, local_steps=2, learning_rate=0.5)


def test_a_withheld_layer_in_a_change_is_caught(monkeypatch):
    true = FederatedThreat.message

    def leaky(*arguments, **more):
        sent = true(*arguments, **more)
        return replace(sent, tensors={**sent.tensors, "home": sent.tensors["classifier.bias"]})

    monkeypatch.setattr(FederatedThreat, "message", leaky)
    with pytest.raises(defence.DefenceError, match="on the wire"):
        judged(CHANGED["withheld"])


def judged_in(dtype, rows, **more):
    made = replace(LOADED, module=copy.deepcopy(LOADED.module).to(dtype))
    return defence.check_change(Threat(**more), made, Policy(rows).plan(slots(made.module)), [BATCH])


SHORT = {"local_steps": 2, "learning_rate": 1e-3}
"""Steps that 16 bits hardly show."""


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
def test_what_the_weights_own_rounding_hides_is_measured_in_float64(monkeypatch, dtype, rate):
    steps = {"local_steps": 2, "learning_rate": rate}
    found = judged_in(dtype, DP_SGD, **steps)
    assert f"in float64, because rounding in {str(dtype).removeprefix('torch.')} hides too much" in found.judged
    for measured, claimed in found.noise.values():
        assert measured == pytest.approx(claimed, rel=0.15)
    monkeypatch.setattr(local, "noise", noised_by(0.5))
    with pytest.raises(defence.DefenceError, match="the table claims"):
        judged_in(dtype, DP_SGD, **steps)


def test_a_clip_that_rounding_hides_is_caught(monkeypatch):
    monkeypatch.setattr(wire, "clip_factors", lambda norms, *_: norms * 0 + 1)
    with pytest.raises(defence.DefenceError, match="above its bound"):
        judged_in(torch.bfloat16, [{"layers": "all", "clip": 0.05}], **SHORT)


def test_noise_on_the_whole_change_is_not_rounded_with_the_weights(monkeypatch):
    assert "float64" not in judged_in(torch.bfloat16, CHANGED["whole"], **SHORT).judged
    monkeypatch.setattr(local, "noise", noised_by(0.9))
    with pytest.raises(defence.DefenceError, match="the table claims"):
        judged_in(torch.bfloat16, CHANGED["whole"], **SHORT)


def test_what_no_precision_shows_does_not_pass():
    with pytest.raises(defence.DefenceError, match="too small beside the weights' own rounding"):
        judged_in(torch.float32, DP_SGD, local_steps=1, learning_rate=1e-15)
