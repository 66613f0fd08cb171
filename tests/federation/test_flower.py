"""The federation on Flower: same seeds, same split, same global weights as the embedded engine."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dpguard.cli.planning import plan_study
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.federation import flower, rounds
from dpguard.federation.settings import Settings
from dpguard.federation.split import split
from dpguard.federation.superlink import simulate
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.texts import Example
from dpguard.policy.table import Policy
from dpguard.study import legs
from dpguard.study.spec import Study
from tests import tiny


def home(folder):
    tiny.module("bert", width=16, blocks=2).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return models.load(str(folder / "model"), labels=2, seed=0)


TEXTS = [Example(" ".join(tiny.WORDS[(3 * i + k) % 60] for k in range(3 + i % 5)), i % 2) for i in range(24)]


def test_without_flower_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dpguard.federation.superlink.installed", lambda: False)
    with pytest.raises(UserError, match=r"dpguard\[flower\]"):
        simulate(tmp_path, nodes=2)


def test_a_superlink_that_cannot_be_reached_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("flwr", reason="the [flower] extra is not installed")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr("dpguard.federation.superlink._tool", lambda name: "false")
    with pytest.raises(UserError, match="does not answer"):
        simulate(tmp_path, nodes=2)
    with pytest.raises(UserError, match="no Flower app"):
        simulate(tmp_path / "nowhere", nodes=2)


def test_texts_are_written_once_their_removal_is_certain(tmp_path, monkeypatch):
    made, order = home(tmp_path), []

    @contextlib.contextmanager
    def superlink(place, scratch):
        order.append(("kept", any((folder / flower.SPEC).exists() for folder in scratch)))
        yield {}

    def run(app, *_arguments):
        order.append(("run", TEXTS[0].text in (app.parent / flower.SPEC).read_text()))
        raise UserError("enough")

    monkeypatch.setattr("dpguard.federation.superlink.installed", lambda: True)
    monkeypatch.setattr("dpguard.federation.superlink._superlink", superlink)
    monkeypatch.setattr("dpguard.federation.superlink._run", run)
    settings = Settings(clients=3, per_round=2, rounds=1)
    plan = Policy([{"layers": "all", "clip": 1.0}]).plan(slots(made.module))
    with pytest.raises(UserError, match="enough"):
        flower.run(made, TEXTS, split(TEXTS, (), settings)[0], plan, settings, labels=2, seed=0)
    assert order == [("kept", False), ("run", True)]


@pytest.mark.slow
def test_flower_and_the_embedded_engine_give_the_same_global_weights(tmp_path):
    """Without noise to 1e-5; with an update clip, a withheld layer and kept moments of local momentum."""
    pytest.importorskip("ray", reason="the [flower] extra is not installed")
    settings = Settings(
        clients=3, per_round=2, rounds=3, local_steps=2, batch_size=4, learning_rate=0.05,
        momentum=0.5, keep_state=True,
    )  # fmt: skip
    rows = [{"layers": "all", "clip": 1.0}, {"layers": "pooler", "share": False}]
    first, second = home(tmp_path), home(tmp_path)
    plan = Policy(rows).plan(slots(first.module))
    parts, _ = split(TEXTS, (), settings)
    seen = {}
    run = rounds.run(
        first.module, first.tokenizer, TEXTS, parts, plan, settings, seed=1, delta=1e-3,
        on_weights=lambda r, w, s: seen.update({r: {n: v.clone() for n, v in w.items()}}),
    )  # fmt: skip
    kept, lines = {}, []
    other = flower.run(
        second, TEXTS, parts, plan, settings, labels=2, seed=1, delta=1e-3, keep=[2],
        on_weights=lambda r, w, s: kept.update({r: w}), say=lines.append,
    )  # fmt: skip
    assert lines, "what Flower logs is handed on"
    assert run.weights.keys() == other.weights.keys()
    for name, value in run.weights.items():
        assert float((value - other.weights[name]).abs().max()) <= 1e-5, name
    assert any(not torch.equal(seen[1][n], v) for n, v in run.weights.items()), "something was trained"
    assert all(torch.allclose(kept[2][n], v, atol=1e-5) for n, v in seen[2].items())
    assert (run.taken, run.bytes) == (other.taken, other.bytes)
    assert [ledger.messages for ledger in run.ledgers] == [ledger.messages for ledger in other.ledgers]
    for one, two in zip(run.states, other.states, strict=True):
        assert one.personal.keys() == two.personal.keys()
        assert all(torch.allclose(v, two.personal[n], atol=1e-5) for n, v in one.personal.items())


STUDY = """\
name: fed
model: demo
data: demo
policies: {mine: {rows: [{layers: all, clip: 1.0}]}}
federation: {clients: 2, per_round: 2, rounds: 2, batch_size: 8, engine: ENGINE}
"""


def planned(engine, folder):
    return plan_study(Study.read(Document.parse(STUDY.replace("ENGINE", engine), "s.yaml")), folder)


def test_the_engine_is_no_part_of_a_cells_identity_and_a_missing_extra_shows_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dpguard.federation.superlink.installed", lambda: True)
    one, two = planned("embedded", tmp_path), planned("flower", tmp_path)
    assert [cell.id for cell in one.cells] == [cell.id for cell in two.cells]
    assert (one.context["engine"], two.context["engine"]) == ("embedded", "flower")
    monkeypatch.setattr("dpguard.federation.superlink.installed", lambda: False)
    with pytest.raises(UserError, match=r"s.yaml:5:\d+: Flower is not installed"):
        planned("flower", tmp_path)
    with pytest.raises(UserError, match="did you mean 'flower'"):
        planned("flowr", tmp_path)


@pytest.mark.slow
def test_a_study_on_flower_records_what_the_embedded_engine_records(tmp_path):
    pytest.importorskip("ray", reason="the [flower] extra is not installed")
    found = []
    for engine in ("embedded", "flower"):
        ready = planned(engine, tmp_path)
        cell = next(c for c in ready.cells if c.leg == "utility" and c.policy == "mine")
        found.append(legs.execute(cell, ready.context)[0].result)
    one, two = found
    assert one["predictions"] == two["predictions"]
    assert one["federation"]["bytes"] == two["federation"]["bytes"]
    assert one["federation"]["rounds"] == two["federation"]["rounds"]
