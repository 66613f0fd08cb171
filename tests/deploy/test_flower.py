"""The Flower mod is the gate: same tensors, same refusals; and two real clients with real text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the [flower] extra is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpguard.deploy import golden, training
from dpguard.deploy.adapters import flower
from dpguard.deploy.checks import Refused
from dpguard.deploy.export import export
from dpguard.deploy.site import Reply, Site
from dpguard.errors import UserError
from dpguard.federation.superlink import simulate
from dpguard.policy.ledger import Ledger
from tests.deploy import cases, records


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Flower lets messages be made inside its own processes alone."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)


class Node:
    """One client behind the mod, without a network: an app whose training function is given."""

    def __init__(self, folder, vectors, train):
        self.folder, self.vectors = folder, vectors
        (folder / "exported").mkdir(parents=True, exist_ok=True)
        vectors.rehearsal.write(folder / "exported")
        self.app = ClientApp()
        self.app.train(mods=[flower.PrivacyMod(opener=self.open)])(train)
        self.app.evaluate(mods=[flower.PrivacyMod(opener=self.open)])(train)

    def open(self, _context):
        site = Site(self.folder / "exported", self.folder / "state", client="a", generator=self.vectors.generator())
        if site.plan.withheld:
            site.keep_personal({n: self.vectors.base[n] for n in site.plan.withheld})
        return site

    def ask(self, weights=None, *, kind="train", round_number=1, **config):
        record = RecordDict({
            "arrays": flower.arrays(weights or self.vectors.base),
            "config": ConfigRecord({"server-round": round_number, **config}),
        })  # fmt: skip
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        return self.app(Message(record, dst_node_id=1, message_type=kind), context)


def through_the_mod(folder):
    def through(vectors):
        node = Node(folder, vectors, lambda m, c: flower.offer(vectors.update, vectors.rehearsal.message, m))
        return flower.tensors(node.ask().content.array_records["arrays"])

    return through


@pytest.fixture
def vectors():
    return golden.make(cases.rehearsal("whole update"))


@pytest.mark.parametrize("name", cases.TABLES)
def test_golden_vectors_through_the_mod(name, tmp_path):
    assert "identical" in golden.compare(golden.make(cases.rehearsal(name)), through_the_mod(tmp_path))


def test_an_asked_again_round_is_answered_with_the_same_message_and_no_training(vectors, tmp_path):
    calls = []

    def train(message, context):
        calls.append(1)
        return flower.offer(vectors.update, vectors.rehearsal.message, message)

    node = Node(tmp_path, vectors, train)
    one, two = (flower.tensors(node.ask().content.array_records["arrays"]) for _ in range(2))
    assert calls == [1]
    assert all(torch.equal(one[n], two[n]) for n in one)


def reply(message, *records, **more):
    return Message(RecordDict({f"r{i}": r for i, r in enumerate(records)} | more), reply_to=message)


HOSTILE = {
    "metrics beside": lambda v, m: reply(m, flower.arrays(v.update), MetricRecord({"loss": 0.1}), dpguard=form(v)),
    "configuration beside": lambda v, m: reply(m, flower.arrays(v.update), ConfigRecord({"a": "b"}), dpguard=form(v)),
    "no form": lambda v, m: reply(m, flower.arrays(v.update)),
    "two arrays": lambda v, m: reply(m, flower.arrays(v.update), flower.arrays(v.update), dpguard=form(v)),
    "no arrays": lambda v, m: reply(m, dpguard=form(v)),
    "float16": lambda v, m: reply(m, halves(v), dpguard=form(v)),
    "full": lambda v, m: reply(m, flower.arrays({n: v.base[n] + u for n, u in v.update.items()}), dpguard=form(v)),
}  # fmt: skip


def form(vectors):
    from dataclasses import asdict

    return ConfigRecord({"form": json.dumps(asdict(vectors.rehearsal.message))})


def halves(vectors):
    return ArrayRecord({n: Array(v.numpy().astype(np.float16)) for n, v in vectors.update.items()})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_replies_do_not_leave(name, vectors, tmp_path):
    node = Node(tmp_path, vectors, lambda m, c: HOSTILE[name](vectors, m))
    with pytest.raises(Refused):
        node.ask()
    assert not (tmp_path / "state" / "outbox.safetensors").exists()


@pytest.mark.parametrize("mistake", [KeyError, UserError], ids=["a bug", "a mistake in the site's own file"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_goes_wrong_at_the_site_is_not_told_to_the_server(mistake, kind, vectors, tmp_path, caplog):
    """A sentence about a site's file may quote its first text: no column 'text'; expected one of: ..."""

    def train(message, context):
        raise mistake("the patient called about her test result")

    with pytest.raises(Refused) as told:
        Node(tmp_path, vectors, train).ask(kind=kind)
    assert "patient" not in str(told.value)
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__
    assert "patient" in caplog.text, "the site's own log has it"


def test_evaluation_metrics_need_to_be_allowed(vectors, tmp_path):
    node = Node(tmp_path, vectors, lambda m, c: reply(m, MetricRecord({"accuracy": 0.9})))
    with pytest.raises(Refused, match="accuracy"):
        node.ask(kind="evaluate")


def test_another_server_table_and_another_model_stop_before_training(vectors, tmp_path):
    node = Node(tmp_path, vectors, lambda m, c: pytest.fail("trained"))
    with pytest.raises(Refused, match="table"):
        node.ask(**{"dpguard-plan": "0" * 16})
    with pytest.raises(Refused, match="first round"):
        node.ask({n: v + 1 for n, v in vectors.base.items()})


def test_the_strategy_merges_partial_messages_into_the_current_weights():
    made = cases.rehearsal("per block, partial")
    weights = training.first_weights(cases.model())
    strategy = flower.Merging(made, clients=2)
    strategy._weights = weights
    messages = []
    for node, size in ((2, 1.0), (1, 3.0)):
        got = {n: torch.full_like(weights[n], size) for n in made.plan.shared}
        asked = Message(RecordDict(), dst_node_id=node, message_type="train")
        messages.append(Message(flower.content(Reply(got, {})), reply_to=asked))
    arrays, metrics = strategy.aggregate_train(1, messages)
    after = flower.tensors(arrays)
    assert metrics is None
    assert set(after) == set(weights), "nothing shrank"
    for name, value in after.items():
        moved = made.message.server_rate * 2.0 if name in made.plan.shared else 0.0
        assert torch.allclose(value, weights[name] - moved)
    with pytest.raises(UserError, match="none of 0 clients"):
        strategy.aggregate_train(2, [])


@pytest.mark.slow
def test_two_clients_with_real_text_on_flowers_simulation(tmp_path):
    """The exported app, as its receiver runs it; then one more round than the budget has."""
    pytest.importorskip("ray", reason="Flower's simulation needs Ray")
    home = records.home(tmp_path / "h")
    federation = {"clients": 2, "per_round": 2, "rounds": 4, "local_steps": 2, "batch_size": 4, "learning_rate": 0.05}
    made = export(
        records.study(tmp_path / "s", home, federation=federation), to="flower", policy="dp", out=tmp_path / "e"
    )
    lines = []
    given = [f'data="{home / "texts.jsonl"}"', "deal=false", "rounds=2", f'weights="{tmp_path / "w.safetensors"}"']
    simulate(made.folder, nodes=2, settings=given, say=lines.append)
    after = load_file(tmp_path / "w.safetensors")
    before = training.first_weights(cases.model())
    assert set(after) == set(before)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    for k in (0, 1):
        with Ledger(
            f"client-{k}", made.rehearsal.model.kind, 1e-3, path=Ledger.beside(made.folder / "state" / f"client-{k}")
        ) as ledger:
            assert ledger.messages == 4
    given[2] = "rounds=3"  # another federation: 2 rounds are left of the 4 that the budget has
    with pytest.raises(UserError, match="did not end well"):
        simulate(made.folder, nodes=2, settings=given, say=lines.append)
    assert any("budget" in line for line in lines)
