"""``utility.policies``: which policies are trained; the others are attacked and accounted for as one message."""

from __future__ import annotations

import pytest

from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.spec import Study

STUDY = """\
name: s
model: demo
data: demo
policies:
  one: {sweep: {noise: [1, 2]}, rows: [{layers: all, clip: 1, noise: $noise}]}
  query: {rows: [{layers: all, train: false, share: false}, {layers: "block[0]", train: true, share: true}]}
leakage: {targets: 2, at: [start, tuned]}
utility: {epochs: 2, batch_size: 50, seeds: [0, 1], policies: [none]}
"""
DATA = {"name": "d", "hash": "2", "train": 1000, "test": 100}


def read(text):
    return Study.read(Document.parse(text, "study.yaml"))


def cells(text):
    return read(text).cells({"name": "m", "hash": "1"}, DATA, None)


def test_only_the_named_policies_are_trained():
    found = cells(STUDY)
    assert [(c.policy, c.seed) for c in found if c.leg == "utility"] == [("none", 0), ("none", 1)]
    [control] = [c for c in found if c.leg == "utility" and c.seed == 0]
    tuned = [c for c in found if c.settings.get("at") == "tuned"]
    assert len(tuned) == 4
    assert {c.settings[NEEDS] for c in tuned} == {control.id}


def test_a_swept_policy_is_named_once():
    found = cells(STUDY.replace("[none]", "[none, one]"))
    trained = {c.policy for c in found if c.leg == "utility"}
    assert trained == {"none", "one noise=1", "one noise=2"}


def test_what_is_not_trained_is_accounted_for_as_one_message():
    promised = {c.policy: c.settings for c in cells(STUDY) if c.leg == "guarantee"}
    assert (promised["none"]["sampling_rate"], promised["none"]["steps"]) == (0.05, 40)
    assert (promised["one noise=1"]["sampling_rate"], promised["one noise=1"]["steps"]) == (1.0, 1)


def test_naming_all_changes_no_cell():
    every = STUDY.replace(", policies: [none]", "")
    assert {c.id for c in cells(every)} == {c.id for c in cells(STUDY.replace("[none]", "[none, one, query]"))}


BAD = {
    "misspelt": ("[none]", "[nome]", "unknown policy 'nome'; did you mean 'none'?"),
    "a variant": ("[none]", '[none, "one noise=1"]', "unknown policy 'one noise=1'"),
    "nothing": ("[none]", "[]", "expected names of policies, such as [none]"),
    "tuned without it": ("[none]", "[one]", "weights that 'none' is trained to, expected it there"),
    "end without them": ("[start, tuned]", "[end]", "weights that 'one' is trained to, expected it there"),
    "its own training": ("$noise}]}", "$noise}], utility: {epochs: 1}}", "expected a 'utility' section"),
    "a search": ("[1, 2]", "{auto: {utility: 0.5}, between: [1, 2]}", "nothing measures utility"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_list_that_cannot_be_meant(name):
    old, new, told = BAD[name]
    with pytest.raises(UserError, match=r"study\.yaml") as error:
        read(STUDY.replace(old, new, 1))
    assert told in str(error.value), str(error.value)


def test_a_federation_trains_every_policy():
    federation = "federation: {clients: 4, per_round: 2, rounds: 2, split: iid}\n"
    with pytest.raises(UserError, match="a federation trains every policy"):
        read(STUDY.replace(", at: [start, tuned]", "").replace("epochs: 2, batch_size: 50, ", "") + federation)
