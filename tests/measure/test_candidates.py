"""The closed world: which of M texts was it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dpguard.attacks import panel
from dpguard.cli.planning import plan_study
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from dpguard.study import guarantee_leg, legs
from dpguard.study.spec import Study
from tests import messages, tiny

TEXT = """\
name: s
model: demo
data: demo
policies:
  dp: {rows: [{layers: all, clip: 0.05, noise: NOISE}]}
leakage: {attacks: [likelihood], targets: 6, threat: {candidates: M}}
"""


def study(noise=0.1, m=20, more=""):
    return Study.read(Document.parse(TEXT.replace("NOISE", str(noise)).replace("M}", f"{m}}}") + more, "s.yaml"))


def test_the_true_text_is_among_them_once_in_an_order_of_the_seed():
    public = [f"text {i}" for i in range(50)]
    first = Threat(candidates=20).disclosed_candidates("text 3", public, 7)
    assert len(set(first)) == len(first) == 20
    assert first.count("text 3") == 1
    assert first == Threat(candidates=20).disclosed_candidates("text 3", public, 7)
    places = {Threat(candidates=20).disclosed_candidates("mine", public, s).index("mine") for s in range(40)}
    assert len(places) > 10
    with pytest.raises(UserError, match="expected at most 51 candidates"):
        Threat(candidates=60).disclosed_candidates("mine", public, 0)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.05, 1.0, 1.0), (50.0, 0.0, 0.5)])
def test_identification_is_near_one_and_near_chance(tmp_path, monkeypatch, noise, least, most):
    monkeypatch.setattr(guarantee_leg, "_kappa", lambda *_: {})  # measured elsewhere, and slow
    planned = plan_study(study(noise), tmp_path)
    cells = {(c.leg, c.policy): c for c in planned.cells}
    record, _ = legs.execute(cells["leakage", "dp"], planned.context)
    scores = [s["metrics"]["exact_match"] for s in record.result["scores"] if s["attack"] == "likelihood"]
    assert len(scores) == 6
    assert least <= sum(scores) / 6 <= most
    promised, _ = legs.execute(cells["guarantee", "dp"], planned.context)
    assert promised.result["bound"]["kappa"] == 1 / 20
    assert promised.result["bound"]["success"] >= 1 / 20


@pytest.mark.slow
def test_one_of_ten_thousand_is_named_and_every_one_was_scored():
    source, truth, model = random.Random(0), "the nurse called her today", tiny.loaded("bert")
    public = list(dict.fromkeys(" ".join(source.sample(tiny.WORDS, 4)) for _ in range(11_000)))
    rows = Policy.load("block[0].attention.query").rows  # the class is not given away: both are scored
    seen, batch = messages.observe(model, rows, [truth], [1], tell=())
    among = Threat(candidates=10_000).disclosed_candidates(truth, public, 0)
    assert len(set(among)) == 10_000
    seen = replace(seen, disclosed=replace(seen.disclosed, candidates=among))
    found = panel.attack("likelihood").reconstruct(seen, seed=0)
    assert (found.notes["unscored"], found.candidates) == (0, 2 * 10_000)
    assert found.sequences == batch.input_ids.tolist()


def test_the_open_world_keeps_its_ids():
    cells = study(m=0).cells({"name": "m"}, {"name": "d", "train": 100, "test": 9})
    assert all("candidates" not in c.settings and "candidates" not in c.settings.get("threat", {}) for c in cells)


@pytest.mark.parametrize(
    ("m", "more", "words"),
    [
        (1, "", "1 leaves nothing to find"),
        (20, "utility: {}\nfederation: {clients: 2, per_round: 1, rounds: 1}\n", "no federation"),
    ],
)
def test_what_a_closed_world_cannot_be(m, more, words):
    with pytest.raises(UserError, match=words):
        study(m=m, more=more)


def test_more_candidates_than_public_texts(tmp_path):
    with pytest.raises(UserError, match=r"s\.yaml:6:.*candidates: 9999 is more than the \d+ public texts"):
        plan_study(study(m=9999), tmp_path)
