"""The defence-effect check catches a defence that is not applied; planted bugs, not readings of the code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpguard.engine import wire
from dpguard.engine.client import Client
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.measure import defence
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
