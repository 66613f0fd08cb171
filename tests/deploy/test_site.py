"""A client in the field: its ledger, its outbox, its own stricter table."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from dpguard.deploy import training
from dpguard.deploy.checks import Refused
from dpguard.deploy.rehearsal import Rehearsal
from dpguard.deploy.server import Server
from dpguard.deploy.site import Site, weights_digest
from dpguard.deploy.stricter import stricter
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.guarantee import sigma_eff
from dpguard.policy.ledger import BudgetSpent
from dpguard.policy.table import Policy
from tests.deploy import cases

DP = "dp-sgd, differences"


def exported(folder, name=DP, **more):
    folder.mkdir(exist_ok=True)
    made = cases.rehearsal(name, **more)
    made.write(folder)
    return folder, made


def rounds(site, count, *, start=1, weights=None, seed=None):
    """Play server and one client for some rounds; the global weights after them."""
    model = cases.model()
    weights = weights or training.first_weights(model)
    server = Server(site.rehearsal)
    for number in range(start, start + count):
        reply = training.one_round(site, model, cases.texts(), weights, round_number=number, seed=seed)
        weights = server.step(weights, [reply.tensors])
    return weights


@pytest.mark.parametrize("name", cases.TABLES)
def test_what_is_written_is_what_is_read(name, tmp_path):
    folder, made = exported(tmp_path / "e", name)
    found = Rehearsal.read(folder)
    assert found == made
    assert found.plan.hash == made.plan.hash


def test_a_changed_table_is_refused(tmp_path):
    folder, _made = exported(tmp_path / "e")
    text = (folder / "policy.yaml").read_text()
    (folder / "policy.yaml").write_text(text.replace("0.8", "0.08"))
    with pytest.raises(Refused, match="not the table that was rehearsed"):
        Rehearsal.read(folder)


@pytest.mark.parametrize("name", cases.TABLES)
def test_a_client_trains_sends_and_stops_at_its_budget(name, tmp_path):
    folder, made = exported(tmp_path / "e", name, rounds=2)
    with Site(folder, tmp_path / "s", client="a") as site:
        before = training.first_weights(cases.model())
        after = rounds(site, 2)
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved <= set(made.plan.shared)
        assert moved
        assert set(site.personal()) == set(made.plan.withheld)
        if math.isinf(made.budget.epsilon):
            assert site.ledger.epsilon() == math.inf
            return
        assert site.ledger.epsilon() == pytest.approx(made.budget.epsilon, rel=1e-6)
        with pytest.raises(BudgetSpent, match="budget"):
            rounds(site, 1, start=3, weights=after)
        assert site.ledger.messages == made.budget.messages


def test_the_ledger_goes_on_after_a_restart_and_an_asked_again_round_is_sent_again(tmp_path):
    folder, made = exported(tmp_path / "e")
    model, first = cases.model(), training.first_weights(cases.model())
    with Site(folder, tmp_path / "s", client="a") as site:
        one = training.one_round(site, model, cases.texts(), first, round_number=1)
        assert not one.again
    with Site(folder, tmp_path / "s", client="a") as site:
        assert site.ledger.messages == made.messages_a_round
        two = training.one_round(site, model, cases.texts(), first, round_number=1)
        assert two.again
        assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)
        assert site.ledger.messages == made.messages_a_round, "sent twice, counted once"
        other = {n: v + 1e-3 if made.plan[n].train else v for n, v in first.items()}
        three = training.one_round(site, model, cases.texts(), other, round_number=2)
        assert not three.again
        assert site.ledger.messages == 2 * made.messages_a_round


KILLED = """
import os, signal, sys
import torch
from dpguard.deploy import site, training
from tests.deploy import cases
torch.set_num_threads(1)
folder, state, where, at = sys.argv[1:]
real = getattr(site.Ledger, "spend") if where == "before ledger" else site.Site.send
count = 0
def dies(self, *a, **k):
    global count
    count += 1
    if count < int(at):
        return real(self, *a, **k)
    if where == "after ledger":
        real(self, *a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
if where == "before ledger":
    site.Ledger.spend = dies
else:
    site.Site.send = dies
from tests.deploy.test_site import rounds
with site.Site(folder, state, client="a") as made:
    rounds(made, 4, seed=3)
"""


@pytest.mark.parametrize("where", ["before ledger", "after ledger", "before sending"])
def test_killed_and_restarted_the_ledger_equals_an_uninterrupted_run(where, tmp_path):
    """SIGKILL in round 2, at three places; the federation goes on from round 2 with the same global weights."""
    folder, made = exported(tmp_path / "e")
    with Site(folder, tmp_path / "whole", client="a") as site:
        rounds(site, 4, seed=3)
        expected = (site.ledger.messages, site.ledger.epsilon())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "s"), where, "2"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Site(folder, tmp_path / "s", client="a") as site:
        one_round_spent = made.messages_a_round
        assert site.ledger.messages == one_round_spent * (2 if where == "after ledger" else 1)
        model, server = cases.model(), Server(site.rehearsal)
        # the server has the weights of round 2 still: those that round 1's message made
        weights = weights_after_round_one(tmp_path, folder)
        for number in (2, 3, 4):
            reply = training.one_round(site, model, cases.texts(), weights, round_number=number, seed=3)
            assert reply.again == (number == 2 and where != "before sending")
            weights = server.step(weights, [reply.tensors])
        assert (site.ledger.messages, site.ledger.epsilon()) == expected


def weights_after_round_one(tmp_path, folder):
    with Site(folder, tmp_path / "replay", client="a") as site:
        return rounds(site, 1, seed=3)


def test_a_site_enforces_its_own_stricter_table(tmp_path):
    folder, made = exported(tmp_path / "e")
    own = tmp_path / "own.yaml"
    rows = [{"layers": "all", "clip": 0.5, "noise": 1.6}, {"layers": "embeddings", "train": False}]
    own.write_text(yaml.safe_dump({"name": "own", "rows": rows}))
    assert_without_embeddings(Site(folder, tmp_path / "t", client="a", table=own), made)
    own.write_text(yaml.safe_dump({"name": "own", "rows": [{"layers": "embeddings", "share": False}]}))
    assert_without_embeddings(Site(folder, tmp_path / "s", client="a", table=own), made)


def assert_without_embeddings(opened, made):
    with opened as site:
        reply = training.one_round(
            site, cases.model(), cases.texts(), training.first_weights(cases.model()), round_number=1
        )
        assert not any("embeddings" in name for name in reply.tensors)
        assert set(reply.tensors) < set(made.plan.shared)


def test_the_stricter_of_two_tables_column_by_column():
    parts = slots(cases.model().module)
    server = Policy([{"layers": "all", "clip": 1.0, "noise": 0.8, "keep": 0.5}]).plan(parts)
    site = Policy([{"layers": "all", "clip": 2.0, "noise": 1.5, "bits": 8}, {"layers": "pooler", "share": False}])
    merged = stricter(server, site.plan(parts))
    rule = merged["classifier.weight"]
    assert (rule.clip, rule.noise, rule.keep, rule.bits) == (1.0, 1.5, 0.5, 8)
    assert not any("pooler" in name for name in merged.shared)
    assert stricter(server, Policy([]).plan(parts)) is server
    assert stricter(server, server) is server


@pytest.mark.parametrize(
    "rows",
    [
        [{"layers": "all", "clip": 1.0, "noise": 1.0, "per": "block"}],
        [{"layers": "all", "clip": 1.0, "noise": 1.0, "unit": "update"}],
        [{"layers": "all", "clip": 1.0, "mode": "normalise"}],
        [{"layers": "all", "clip": {"quantile": 0.5}, "noise": 1.0}],
        [{"layers": "all", "noise_std": 1.0}],
        [{"layers": "all", "keep": 0.1, "prune": "random"}],
    ],
)
def test_tables_without_an_order_are_refused(rows):
    parts = slots(cases.model().module)
    server = Policy([{"layers": "all", "clip": 1.0, "noise": 0.8, "keep": 0.5}]).plan(parts)
    with pytest.raises(Refused, match="expected the same"):
        stricter(server, Policy(rows).plan(parts))


FROZEN = {"layers": "embeddings", "train": False}


def test_a_layer_that_one_side_freezes_leaves_its_clip_group():
    """A smaller set at a smaller clip is the stricter one, whoever freezes."""
    parts = slots(cases.model().module)
    laxer, tighter = {"layers": "all", "clip": 1.0, "noise": 0.8}, {"layers": "all", "clip": 0.5, "noise": 1.0}
    for server, site in (([laxer], [tighter, FROZEN]), ([laxer, FROZEN], [tighter])):
        merged = stricter(Policy(server).plan(parts), Policy(site).plan(parts))
        (group,) = merged.groups.values()
        assert (group.clip, {rule.noise for rule in group.rules}) == (0.5, {1.0})
        assert not any("embeddings" in name for name in merged.trained)


def test_groups_that_differ_where_both_train_are_refused():
    parts = slots(cases.model().module)
    server = Policy([{"layers": "all", "clip": 1.0, "noise": 0.8}]).plan(parts)
    for rows in (
        [{"layers": "all", "clip": 0.5, "noise": 1.0, "per": "block"}, FROZEN],
        [{"layers": ["block[0]", "head"], "clip": 0.5, "noise": 1.0}, FROZEN],
    ):
        with pytest.raises(Refused, match="other groups"):
            stricter(server, Policy(rows).plan(parts))


def test_what_is_left_of_two_tables_promises_no_less_than_either():
    parts = slots(cases.model().module)
    starts = [{"layers": "all", "clip": c, "noise": n, "per": per} for c, n in ((1.0, 0.8), (0.5, 1.0))
              for per in ("row", "block")]  # fmt: skip
    mores = [
        [],
        [FROZEN],
        [{"layers": "block[0]", "train": False}],
        [{"layers": "block[0]", "clip": 0.2, "noise": 0.5}],
        [{"layers": ["embeddings", "pooler", "head"], "train": False}, {"layers": "block[1]", "train": False}],
    ]
    tables = [Policy([start, *more]).plan(parts) for start in starts for more in mores]
    merged = 0
    for server, site in itertools.product(tables, tables):
        try:
            found = stricter(server, site)
        except Refused:
            continue
        merged += 1
        assert sigma_eff(found, 9) >= max(sigma_eff(server, 9), sigma_eff(site, 9)) - 1e-12
        assert set(found.trained) == set(server.trained) & set(site.trained)
        for group in found.groups.values():
            for plan in (server, site):
                # each group lies inside one of either table, at its clip or below
                assert any(set(group.names) <= set(of.names) and group.clip <= of.clip for of in plan.groups.values())
            assert len({rule.clip for rule in group.rules}) == 1
    assert len(tables) < merged < len(tables) ** 2


def test_other_clients_ledgers_budgets_and_too_few_texts_are_refused(tmp_path):
    folder, made = exported(tmp_path / "e")
    with Site(folder, tmp_path / "s", client="a") as site:
        rounds(site, 1)
        with pytest.raises(UserError, match="in use"):
            Site(folder, tmp_path / "s", client="a")
    with pytest.raises(UserError, match="another client"):
        Site(folder, tmp_path / "s", client="b")
    with pytest.raises(UserError, match="rehearsed"):
        Site(folder, tmp_path / "t", client="a", budget=made.budget.epsilon * 2)
    with Site(folder, tmp_path / "t", client="a", budget=made.budget.epsilon / 4) as site:
        with pytest.raises(BudgetSpent):
            rounds(site, 4)
        with pytest.raises(Refused, match="at least 32 texts"):
            training.local_update(site, cases.model(), cases.texts(31), round_number=1)


@pytest.mark.parametrize("name", ["withheld, whole update", "withheld, gradients"])
def test_layers_at_home_move_with_a_message_in_the_ledger_or_not_at_all(name, tmp_path):
    """A round that is tried again and again before its message is made starts from the same layers each time."""
    folder, _made = exported(tmp_path / "e", name)
    model, first = cases.model(), training.first_weights(cases.model())
    with Site(folder, tmp_path / "s", client="a") as site:
        training.one_round(site, model, cases.texts(), first, round_number=1, seed=3)
        home = site.personal()
        assert home
        training.set_weights(model.module, first)
        for _ in range(3):
            update, form = training.local_update(site, model, cases.texts(), round_number=2, seed=3)
            assert all(torch.equal(site.personal()[n], home[n]) for n in home)
    with Site(folder, tmp_path / "s", client="a") as site:  # killed there, and begun anew
        update, form = training.local_update(site, model, cases.texts(), round_number=2, seed=3)
        site.send(update, first, round_number=2, form=form)
        moved = site.personal()
        assert any(not torch.equal(moved[n], home[n]) for n in home)
    with Site(folder, tmp_path / "t", client="a") as site:
        for number in (1, 2):
            training.one_round(site, model, cases.texts(), first, round_number=number, seed=3)
        if name == "withheld, whole update":  # the other one draws secret noise at the gate
            assert all(torch.allclose(site.personal()[n], moved[n]) for n in moved)


def test_killed_after_the_ledger_the_layers_at_home_move_in_at_the_next_start(tmp_path, monkeypatch):
    folder, _made = exported(tmp_path / "e", "withheld, whole update")
    model, first = cases.model(), training.first_weights(cases.model())
    with Site(folder, tmp_path / "s", client="a") as site:
        training.one_round(site, model, cases.texts(), first, round_number=1)
        home = site.personal()
        monkeypatch.setattr(site, "_move_in", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.one_round(site, model, cases.texts(), first, round_number=2)
        spent = site.ledger.messages
        assert all(torch.equal(site.personal()[n], home[n]) for n in home)
    with Site(folder, tmp_path / "s", client="a") as site:
        assert site.ledger.messages == spent
        assert any(not torch.equal(site.personal()[n], home[n]) for n in home)


@pytest.mark.parametrize("gone", [["dpguard-ledger.json"], ["dpguard-ledger.json", "dpguard-ledger.json.lock"]])
def test_a_ledger_that_has_gone_is_missed(gone, tmp_path):
    folder, _made = exported(tmp_path / "e", "withheld, whole update")
    with Site(folder, tmp_path / "s", client="a") as site:
        rounds(site, 2)
    for name in gone:
        (tmp_path / "s" / name).unlink()
    with pytest.raises(UserError, match=r"expected the .*from a copy") as caught:
        Site(folder, tmp_path / "s", client="a")
    assert "\n" not in str(caught.value)


def test_damaged_layers_at_home_are_said(tmp_path):
    folder, _made = exported(tmp_path / "e", "withheld, whole update")
    with Site(folder, tmp_path / "s", client="a") as site:
        rounds(site, 1)
    kept = tmp_path / "s" / "personal.safetensors"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match=r"personal\.safetensors is damaged"):
        Site(folder, tmp_path / "s", client="a")


def test_a_damaged_outbox_is_said(tmp_path):
    folder, _made = exported(tmp_path / "e")
    with Site(folder, tmp_path / "s", client="a") as site:
        rounds(site, 1)
        (tmp_path / "s" / "outbox.safetensors").write_bytes(b"half")
        with pytest.raises(UserError, match="damaged"):
            site.begin(training.first_weights(cases.model()), round_number=1)


def test_another_model_and_another_table_of_the_server_are_refused(tmp_path):
    folder, made = exported(tmp_path / "e")
    other = copy.deepcopy(cases.model().module)
    with torch.no_grad():
        other.classifier.bias.add_(1.0)
    weights = {n: p.detach() for n, p in other.named_parameters()}
    with Site(folder, tmp_path / "s", client="a") as site:
        with pytest.raises(Refused, match="first round"):
            site.begin(weights, round_number=1)
        assert site.begin(weights, round_number=2) is None
        with pytest.raises(Refused, match="table"):
            site.begin(training.first_weights(cases.model()), round_number=1, plan_hash="0" * 16)
    assert weights_digest(weights) != weights_digest(training.first_weights(cases.model()))
    assert made.plan.hash == Rehearsal.read(folder).plan.hash
