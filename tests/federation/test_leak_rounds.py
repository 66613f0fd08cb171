"""The attacked messages are those that a client sends: with what earlier ones left at home, and with the same noise."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpguard.cli.planning import plan_study
from dpguard.engine import local, noise
from dpguard.engine.local import LocalState
from dpguard.federation import kept
from dpguard.federation.leak import FederatedThreat
from dpguard.federation.settings import Settings
from dpguard.federation.turn import local_training, one_client_round
from dpguard.measure import defence, leakage
from dpguard.measure.threat import Threat
from dpguard.study import legs
from dpguard.study.spec import Study
from tests import tiny
from tests.federation import small

PRUNED = [{"layers": "all", "keep": 0.02}, {"layers": "head", "share": False}]
CARRIED = {
    "error feedback": {"error_feedback": True},
    "momentum": {"momentum": 0.9, "keep_state": True},
    "adam": {"optimizer": "adam", "learning_rate": 1e-3, "keep_state": True, "error_feedback": True},
}


def settings(**more):
    return Settings(**{"clients": 1, "per_round": 1, "rounds": 4, "batch_size": 8, "local_steps": 2, **more})


def turn(loaded, plan, texts, chosen, round_, state):
    return one_client_round(
        loaded.module, plan, texts, chosen, tokenizer=loaded.tokenizer, seed=0, client=0, round_=round_, state=state
    ).tensors


def entries(tensors):
    return {(name, i) for name, value in tensors.items() for i in value.flatten().nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("more", CARRIED.values(), ids=CARRIED)
def test_later_messages_of_a_record_are_those_that_its_client_sends(more):
    loaded, texts = tiny.loaded("bert", width=16, blocks=2, **small.STILL), small.texts(2)
    plan, chosen, batch = small.plan(PRUNED, loaded.module), settings(**more), leakage.encode(loaded, texts)
    client, states, given, seen = LocalState(), (LocalState(),), set(), set()
    for round_ in (1, 2, 3):
        sent = turn(loaded, plan, texts, chosen, round_, client)
        threat = FederatedThreat.within(Threat(), chosen, states=states, round_=round_)
        attacked = threat.message(loaded, plan, [batch], noise_seed=round_).tensors
        for name, value in sent.items():
            assert torch.allclose(attacked[name], value, rtol=1e-3, atol=1e-6), (round_, name)
        given, seen = given | entries(sent), seen | entries(attacked)
    assert len(seen) == pytest.approx(len(given), rel=0.01)
    if more.get("error_feedback"):
        assert len(seen) > 2 * len(entries(sent)), "what one message leaves out comes with the next"


@pytest.mark.parametrize("more", CARRIED.values(), ids=CARRIED)
def test_what_is_at_home_survives_a_file(tmp_path, more):
    loaded, texts = tiny.loaded("bert", width=16, blocks=2, **small.STILL), small.texts(2)
    plan, chosen, state = small.plan(PRUNED, loaded.module), settings(**more), LocalState()
    for round_ in (1, 2):
        turn(loaded, plan, texts, chosen, round_, state)
    save_file(kept.flat(state), tmp_path / "state.safetensors")
    again = kept.restored(load_file(tmp_path / "state.safetensors"), local_training(chosen), len(plan.trained))
    one, two = (turn(loaded, plan, texts, chosen, 3, s) for s in (state, again))
    fresh = turn(loaded, plan, texts, chosen, 3, LocalState(personal=state.personal))
    assert all(torch.equal(one[name], two[name]) for name in plan.shared)
    assert any(not torch.equal(one[name], fresh[name]) for name in plan.shared)


STUDY = """\
name: fed
model: demo
data: demo
policies: {pruned: {rows: [{layers: all, keep: 0.01}, {layers: head, share: false}]}}
federation: {clients: 2, per_round: 2, rounds: 3, batch_size: 8, error_feedback: true, view: VIEW, observe: [2, 3]}
leakage: {panel: panel-1, attacks: [prior], targets: 2, at: [start, end, rounds]}
utility: {train_examples: 16}
"""


@pytest.mark.parametrize("view", ["client", "aggregate"])
def test_a_studys_messages_start_from_what_the_victims_have_at_home(tmp_path, monkeypatch, view):
    made, true = [], FederatedThreat.message

    def message(threat, *arguments, **more):
        before = copy.deepcopy(threat.states)
        update = true(threat, *arguments, **more)
        made.append((threat.round_, before, threat.states))
        return update

    monkeypatch.setattr(FederatedThreat, "message", message)
    (tmp_path / "s.yaml").write_text(STUDY.replace("VIEW", view))
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    found = {}
    for cell in (cell for cell in planned.cells if cell.policy == "pruned"):
        made.clear()
        assert legs.execute(cell, planned.context)[0].status == "done"
        found[cell.settings.get("at")] = [entry for entry in made if len(entry[1])]
    clients = 2 if view == "aggregate" else 1
    assert [(round_, len(before)) for round_, before, _ in found["rounds"]] == [(r, clients) for r in (2, 2, 3, 3)]
    assert not any(state.residual or state.personal for _, before, _ in found["start"] for state in before)
    for _, before, _ in found["end"] + found["rounds"]:
        assert all(set(state.personal) == {"classifier.weight", "classifier.bias"} for state in before)
    assert all(
        any(value.any() for value in state.residual.values()) for _, before, _ in found["end"] for state in before
    )
    for (_, _, after), (_, before, _) in zip(found["rounds"][:2], found["rounds"][2:], strict=True):
        for left, taken in zip(after, before, strict=True):
            assert all(torch.equal(left.residual[name], value) for name, value in taken.residual.items())
    [_, (_, first, _), _, (_, second, _)] = found["rounds"]
    assert any(not torch.equal(first[0].personal[n], second[0].personal[n]) for n in first[0].personal)


def norm(tensors):
    return float(torch.cat([value.double().flatten() for value in tensors.values()]).norm())


@pytest.mark.parametrize("server", ["fedsgd", "fedavg"])
def test_noise_of_an_absolute_size_meets_the_signal_that_a_client_sends(server):
    loaded, texts = tiny.loaded("bert", width=16, blocks=2, **small.STILL), small.texts(1)
    chosen, batch = settings(server=server, local_steps=1), leakage.encode(loaded, texts)
    noisy, clean = (small.plan([{"layers": "all", "noise_std": std}], loaded.module) for std in (0.01, 1e-9))

    def ratio(send):
        plain, noised = send(clean), send(noisy)
        return norm(plain) / norm({name: noised[name] - value for name, value in plain.items()})

    threat = FederatedThreat.within(Threat(), chosen)
    sent = ratio(lambda plan: turn(loaded, plan, texts, chosen, 1, LocalState()))
    seen = ratio(lambda plan: threat.message(loaded, plan, [batch], noise_seed=1).tensors)
    assert seen == pytest.approx(sent, rel=0.1)


@pytest.mark.parametrize("server", ["fedsgd", "fedavg"])
def test_a_cell_fails_when_local_steps_add_no_noise(tmp_path, monkeypatch, server):
    text = STUDY.replace("keep: 0.01", "clip: 1, noise: 1").replace("at: [start, end, rounds]", "at: start")
    (tmp_path / "s.yaml").write_text(
        text.replace("error_feedback: true, view: VIEW, observe: [2, 3]", f"server: {server}")
    )
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    [cell] = [cell for cell in planned.cells if (cell.leg, cell.policy) == ("leakage", "pruned")]

    class Silent:
        wide = staticmethod(noise.wide)
        add_noise_ = staticmethod(lambda total, std, drawn, divide_by=1: total.div_(divide_by))

    monkeypatch.setattr(local, "noise", Silent)
    if server == "fedsgd":  # a gradient takes no local steps
        assert "gradients" in legs.execute(cell, planned.context)[0].result["defence"]["judged"]
        return
    with pytest.raises(defence.DefenceError, match="the table claims"):
        legs.execute(cell, planned.context)
