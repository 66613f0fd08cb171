"""A study with a federation: what its file may say, its cells, and all of it run in this process."""

from __future__ import annotations

import math

import pytest

from dpguard.cli.planning import plan_study
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.policy.gaussian import success_bound
from dpguard.study import legs
from dpguard.study.cache import Cache
from dpguard.study.spec import Study

HEAD = "name: fed\nmodel: demo\ndata: demo\npolicies: {dp-sgd: }\n"
FED = "federation: {clients: 4, per_round: 2, rounds: 3}\n"


def refused(text):
    with pytest.raises(UserError) as caught:
        Study.read(Document.parse(HEAD + text, "s.yaml"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD = {
    "unknown key": ("{clients: 4, per_round: 2, rounds: 3, local_step: 1}", "unknown key; did you mean 'local_steps'?"),
    "unknown server": (
        "{clients: 4, per_round: 2, rounds: 3, server: fedadm}",
        "s.yaml:5:59: federation.server: unknown value 'fedadm'; did you mean 'fedadam'?",
    ),
    "more a round than there are": (
        "{clients: 4, per_round: 5, rounds: 3}",
        "s.yaml:5:37: federation.per_round: 5 is more than the 4 clients, expected at most 4",
    ),
    "split that does not exist": (
        "{clients: 4, per_round: 2, rounds: 3, split: dirichelt(0.5)}",
        "unknown split 'dirichelt(0.5)'; expected iid, dirichlet(0.5) or column(name); did you mean 'dirichlet'?",
    ),
    "concentration that is no number": (
        "{clients: 4, per_round: 2, rounds: 3, split: dirichlet(x)}", "is no number above 0",
    ),
    "steps under fedsgd": (
        "{clients: 4, per_round: 2, rounds: 3, server: fedsgd, local_steps: 2}",
        "federation.local_steps: fedsgd sends the gradient of one batch",
    ),
    "failures where nobody adds up": (
        "{clients: 4, per_round: 2, rounds: 3, may_fail: 1}", "every client adds the full noise",
    ),
    "everybody may fail": (
        "{clients: 4, per_round: 2, rounds: 3, view: aggregate, may_fail: 2}", "may_fail: 2 of 2 clients",
    ),
    "sizes in an aggregate": (
        "{clients: 4, per_round: 2, rounds: 3, view: aggregate, weights: size}", "expected weights: equal",
    ),
    "a state that does not exist": ("{clients: 4, per_round: 2, rounds: 3, keep_state: true}", "no state to keep"),
    "a round that does not exist": (
        "{clients: 4, per_round: 2, rounds: 3, observe: [1, 4]}\nleakage: {at: rounds}", "round 4 is not one of the 3",
    ),
    "observed without a leg": ("{clients: 4, per_round: 2, rounds: 3, observe: [1, 2]}", "expected leakage.at: rounds"),
    "a leg without rounds": (
        "{clients: 4, per_round: 2, rounds: 3}\nleakage: {at: rounds}", "expected observe: [1, 2]",
    ),
    "epochs": (
        "{clients: 4, per_round: 2, rounds: 3}\nutility: {epochs: 3}",
        "s.yaml:6:19: utility.epochs: a federation has its own, expected federation.rounds",
    ),
    "steps of the threat": (
        "{clients: 4, per_round: 2, rounds: 3}\nleakage: {threat: {local_steps: 3}}",
        "leakage.threat.local_steps: the message is the federation's",
    ),
    "nothing": ("", "federation"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_with_its_place(name):
    section, sentence = BAD[name]
    found = refused(f"federation: {section}\n")
    assert found.startswith("s.yaml:")
    assert sentence in found


def test_rounds_without_a_federation_is_a_mistake():
    assert "expected a 'federation' section" in refused("leakage: {at: rounds}\nutility: {}\n")


def study(tmp_path, text):
    (tmp_path / "s.yaml").write_text(HEAD + text)
    return Study.load(tmp_path / "s.yaml")


def test_more_clients_than_texts_and_columns_that_are_not_there(tmp_path):
    many = study(tmp_path, "federation: {clients: 9, per_round: 2, rounds: 3}\nutility: {train_examples: 8}\n")
    with pytest.raises(UserError, match=r"s\.yaml:5:23: federation\.clients: 9 is more than the 8 training texts"):
        plan_study(many, tmp_path)
    text = HEAD.replace("{dp-sgd: }", "{dp: own.yaml}") + FED.replace("clients: 4", "clients: 3")
    (tmp_path / "s.yaml").write_text(text)
    (tmp_path / "own.yaml").write_text("rows: [{layers: all, clip: 1.0, noise: 1.0}]\nfederation: {clients: 9999}\n")
    with pytest.raises(UserError, match=r"own\.yaml:2:23: federation\..*9999"):
        plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    column = study(tmp_path, "federation: {clients: 2, per_round: 2, rounds: 3, split: column(hospitl)}\n")
    with pytest.raises(UserError, match=r"no column 'hospitl'.*\(asked for by federation\.split\)"):
        plan_study(column, tmp_path)


def test_a_policy_that_the_federation_refuses_is_planned_with_its_reason(tmp_path):
    text = "federation: {clients: 2, per_round: 2, rounds: 3}\nutility: {}\nprivacy: {delta: 1.0e-4}\n"
    head = HEAD.replace("dp-sgd: ", "moving: {rows: [{layers: all, clip: {quantile: 0.5}, noise: 1.0}]}")
    (tmp_path / "s.yaml").write_text(head + text)
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path, epsilons=True)
    assert math.isinf(planned.epsilons["moving"])
    assert set(planned.refused) == {"moving"}
    assert "follows a quantile" in planned.refused["moving"]


def test_a_column_says_whose_a_text_is(tmp_path):
    rows = [f'{{"text": "text {i}", "label": {i % 2}, "ward": "w{i % 3}"}}' for i in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    text = HEAD.replace("data: demo", "data: t.jsonl") + (
        "federation: {clients: 3, per_round: 1, rounds: 1, split: column(ward)}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    few = text.replace("clients: 3", "clients: 4")
    (tmp_path / "s.yaml").write_text(few)
    with pytest.raises(UserError, match="column 'ward' has 3 values, fewer than the 4 clients"):
        plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    assert planned.context["data"]["owner"] == "ward"


def test_what_is_observed_changes_no_training_cell(tmp_path):
    plain = study(tmp_path, FED + "leakage: {at: end}\n")
    looked = study(tmp_path, FED.replace("}", ", observe: [1, 3]}") + "leakage: {at: [end, rounds]}\n")
    one, two = plan_study(plain, tmp_path), plan_study(looked, tmp_path)
    ids = {cell.id for cell in one.cells if cell.leg == "utility"}
    assert ids == {cell.id for cell in two.cells if cell.leg == "utility"}
    other = plan_study(study(tmp_path, FED.replace("rounds: 3", "rounds: 4") + "leakage: {at: end}\n"), tmp_path)
    assert ids.isdisjoint(cell.id for cell in other.cells)


def own(more):
    return (
        "name: s\nmodel: demo\ndata: demo\npolicies:\n"
        "  one: {rows: [{layers: all, clip: 1, noise: 2}]}\n"
        f"  two: {{rows: [{{layers: all, clip: 1, noise: 2}}], federation: {more}}}\n"
    )


def test_a_policy_may_have_a_federation_of_its_own(tmp_path):
    (tmp_path / "s.yaml").write_text(own("{view: aggregate, server: fedadam}") + FED)
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path, epsilons=True)
    views = {c.policy: c.settings["federation"]["view"] for c in planned.cells}
    assert views == {"none": "client", "one": "client", "two": "aggregate"}
    assert planned.epsilons["one"] == planned.epsilons["two"] < math.inf


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("{vew: aggregate}", "s.yaml:6:64: policies.two.federation.vew: unknown key; did you mean 'view'?"),
        ("{view: agregate}", "unknown value 'agregate'; did you mean 'aggregate'?"),
        ("{per_round: 9}", "federation.per_round: 9 is more than the 4 clients, expected at most 4"),
        ("{split: iid}", "federation.split: one for all policies"),
        ("{view: client}", "are the same table in the same federation"),
        ("aggregate", "federation is 'aggregate', expected a mapping"),
    ],
)
def test_a_policys_own_federation_is_checked(more, sentence):
    with pytest.raises(UserError) as caught:
        Study.read(Document.parse(own(more) + FED, "s.yaml"))
    assert str(caught.value).startswith("s.yaml:6:")
    assert sentence in str(caught.value)
    with pytest.raises(UserError, match=r"expected a 'federation' section of the study|expected a mapping"):
        Study.read(Document.parse(own(more) + "utility: {}\n", "s.yaml"))


RUN = """\
federation: {clients: 4, per_round: 2, rounds: 2, local_steps: 2, batch_size: 4, VIEW observe: [1, 2]}
leakage: {panel: panel-1, attacks: [rows], targets: 2, at: [start, end, rounds]}
utility: {train_examples: 48}
"""


@pytest.mark.parametrize("view", ["client", "aggregate"])
def test_a_study_runs_and_its_records_say_what_happened(tmp_path, view):
    text = HEAD.replace("dp-sgd: ", "home: {rows: [{layers: all, clip: 1, noise: 0.5}, {layers: head, share: false}]}")
    (tmp_path / "s.yaml").write_text(text + RUN.replace("VIEW", f"view: {view},"))
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path, epsilons=True)
    results = {}
    for cell in planned.cells:
        if cell.policy == "home":
            record, texts = legs.execute(cell, planned.context)
            assert record.status == "done", record.reason
            results[cell.leg, cell.settings.get("at")] = record.result
            assert texts or cell.leg != "leakage"
    promise, trained = results["guarantee", None], results["utility", None]
    fed = trained["federation"]
    assert promise["epsilon"] == pytest.approx(planned.epsilons["home"])
    # the ledgers of the clients never come to more than what is promised
    assert fed["epsilon"]["max"] <= promise["epsilon"] * (1 + 1e-9)
    assert fed["epsilon"]["max"] == pytest.approx(promise["epsilon"])
    assert 0 < fed["epsilon"]["median"] <= fed["epsilon"]["max"] < math.inf
    assert sum(fed["rounds"]) == 4
    assert len(trained["predictions"]) == len(trained["labels"]) == 600
    assert set(results) >= {("leakage", "start"), ("leakage", "end"), ("leakage", "rounds")}
    assert "after 2 local steps" in results["leakage", "end"]["defence"]["judged"]
    count = 2 if view == "client" else 4
    for at in ("start", "end", "rounds"):
        found = results["leakage", at]["scores"]
        assert len({(s["target"], s["attack"]) for s in found}) == len(found) == count * 2  # with the prior
    words = promise["statement"]
    assert ("secure aggregation is assumed" in words) == (view == "aggregate")
    assert "worst of 4 clients" in words
    # two messages of two noised steps each: mu = 2 / sigma_eff
    bound = success_bound(0.01, 2 / promise["sigma_eff"])
    assert promise["bound"]["success"] == pytest.approx(bound)
    assert "2 messages of the same record, 4 noised steps in all: the chance of recovering it is at most" in words
    assert f"{bound:.3g} where it is 0.01 without them." in words
    # a file of weights that is gone is made again, the same
    cell = next(c for c in planned.cells if c.settings.get("at") == "rounds" and c.policy == "home")
    assert Cache(tmp_path).clear() > 0
    again, _texts = legs.execute(cell, planned.context)
    plain = [{**s, "seconds": 0} for s in again.result["scores"]]
    assert plain == [{**s, "seconds": 0} for s in results["leakage", "rounds"]["scores"]]


def test_the_printed_table_says_what_a_federation_freezes(tmp_path):
    text = HEAD.replace("dp-sgd: ", "cold: {rows: [{layers: all, clip: 1, noise: 0.5}, {layers: head, share: false}]}")
    trains = {}
    for personal in ("trained", "frozen"):
        (tmp_path / "s.yaml").write_text(
            text + f"federation: {{clients: 4, per_round: 2, rounds: 3, personal: {personal}}}\n"
        )
        planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
        cell = next(c for c in planned.cells if c.leg == "guarantee" and c.policy == "cold")
        [head] = [row for row in legs.execute(cell, planned.context)[0].result["table"] if row["parameters"] == "head"]
        trains[personal] = (head["share"], head["train"], head["noise"])
    assert trains == {"trained": (False, True, 0.5), "frozen": (False, False, 0.0)}
