from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.ready import NAMES
from dpguard.policy.sweep import expand
from dpguard.policy.table import Policy
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_ready_made_policy_fits_every_family(name, family):
    plan = Policy.load(name).plan(slots(tiny.module(family)))
    assert plan.shared
    assert not plan.withheld, "ready-made policies have a central utility"


def test_the_names_say_what_is_shared():
    found = slots(tiny.module("bert"))
    parts = {
        name: {Policy.load(name).plan(found)[n].slot.part for n in Policy.load(name).plan(found).shared}
        for name in NAMES
    }
    assert parts["last-block"] == {"block[2]", "pooler", "head"}
    assert parts["upper-blocks"] == {"block[1]", "block[2]", "pooler", "head"}
    assert parts["head-only"] == {"head"}
    assert "embeddings" not in parts["no-embeddings"]
    assert parts["none"] == parts["dp-sgd"] == {"embeddings", "block[0]", "block[1]", "block[2]", "pooler", "head"}


def test_a_selector_is_a_policy():
    plan = Policy.load("block[1].attention.query").plan(slots(tiny.module("bert")))
    assert set(plan.shared) == {f"bert.encoder.layer.1.attention.self.query.{k}" for k in ("weight", "bias")}
    assert set(plan.trained) == set(plan.shared)
    assert Policy.load("all").plan(slots(tiny.module("bert"))).shared_fraction == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dp-sdg", "did you mean 'dp-sgd'?"),
        ("block[1].atention", "did you mean 'attention'?"),
        ("nothing.yaml", "no such file"),
    ],
)
def test_a_misspelt_policy_is_one_sentence(name, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        Policy.load(name)


def test_a_file(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("name: mine\nrows:\n  - {layers: all, clip: 1.0, noise: 1e-1}\n")
    policy = Policy.load(file)
    assert policy.name == "mine"
    assert policy.plan(slots(tiny.module("bert")))["classifier.bias"].noise == 0.1
    file.write_text("rows:\n  - {layers: all, clip: no}\n")
    with pytest.raises(UserError) as error:
        Policy.load(file)
    assert str(error.value).startswith(f"{file}:2:25: 'no' is read as False by YAML; clip is False; expected a number")


def test_sweeps_make_every_combination():
    entry = {
        "rows": [{"layers": "all", "clip": "$clip", "noise": "$noise"}],
        "sweep": {"clip": [0.5, 1.0], "noise": [0.3, 1.0, 3.0]},
    }
    found = expand("dp", entry)
    assert len(found) == 6
    assert found[0][0] == "dp clip=0.5 noise=0.3"
    assert found[-1][1].rows[0] == {"layers": "all", "clip": 1.0, "noise": 3.0}


@pytest.mark.parametrize(
    ("entry", "loc", "said"),
    [
        ({"rows": [{"layers": "all", "clip": 1}], "sweep": {"noise": [1]}}, ("sweep", "noise"), "used by no row"),
        ({"rows": [{"layers": "all", "clip": "$c"}]}, ("rows", 0, "clip"), "set by no sweep"),
        ({"rows": [{"layers": "all", "clip": "$c"}], "sweep": {"c": []}}, ("sweep", "c"), "a list of values"),
        ({"rows": [{"layers": "all", "clip": "$c"}], "sweep": {"c": [1, 1]}}, ("sweep", "c"), "twice"),
        ({"sweep": {}}, (), "has no 'rows'"),
        ({"rows": [], "row": []}, ("row",), "did you mean 'rows'?"),
    ],
)
def test_a_sweep_that_cannot_be_meant(entry, loc, said):
    with pytest.raises(UserError) as error:
        expand("x", entry)
    assert error.value.loc == loc
    assert said in str(error.value)
