"""``dpguard fit-clips``: a table of groups, and a policy that every other command reads back."""

from __future__ import annotations

import json
import math

import pytest

from dpguard.cli.console import console
from dpguard.cli.fitting import as_yaml
from dpguard.inputs import models, texts
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy

POLICY = "name: mine\nrows:\n  - {layers: all, clip: 1.0, per: block, noise: 0.8}\n  - {layers: head, clip: 2.0}\n"


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "P.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def words(home, policy):
    return ["fit-clips", policy, "--model", home / "model", "--data", home / "texts.jsonl"]


def test_table_and_policy(told, words, home):
    status, said, err = told(*words, "--examples", 40)
    assert (status, err) == (0, "")
    assert "must be public" in " ".join(said.split())
    assert "40 public texts" in said
    assert max(map(len, said[said.index("group ") : said.index("# clips")].splitlines())) <= 100
    groups = [line.split()[0] for line in said.splitlines() if line.rstrip().endswith("%")]
    assert groups == ["embeddings", "block[0]", "block[1]", "block[2]", "pooler", "head"]
    comment, *document = said[said.index("# clips") :].splitlines()
    assert comment.startswith("# clips: the 0.5 quantile of the gradient norms of 40 public texts on model ")
    assert document[:2] == ["name: mine", "rows:"]


def test_what_is_written_reads_back_with_the_same_guarantee(told, words, home, policy, tmp_path):
    out = tmp_path / "fitted.yaml"
    status, said, _err = told(*words, "--out", out, "--quantile", 0.8)
    assert status == 0
    assert said.splitlines()[-1] == f"written to {out}"
    assert "rows:" not in said
    facts = ["--model", home / "model", "--sampling-rate", 0.1, "--steps", 50, "--json"]
    claims = [json.loads(told("guarantee", file, *facts)[1]) for file in (policy, out)]
    assert claims[0]["sigma_eff"] == claims[1]["sigma_eff"] < math.inf
    assert claims[0]["epsilon"] == claims[1]["epsilon"]
    plan = Policy.load(out).plan(slots(models.load(str(home / "model")).module))
    assert all(group.clip not in (1.0, 2.0) for group in plan.groups.values())


def test_json_is_the_same_twice_and_another_seed_takes_other_texts(told, words):
    first, again, other = (json.loads(told(*words, "--json", "--examples", 9, "--seed", s)[1]) for s in (3, 3, 4))
    assert first == again != other
    assert first["examples"] == 9
    for group in first["groups"]:
        assert group["clipped"] <= 0.5, "rounded upwards"
        assert group["clipped"] >= 0.5 - 2.5 / 9


def test_more_examples_than_texts_is_all_of_them(told, words):
    assert json.loads(told(*words, "--json", "--examples", 1000)[1])["examples"] == 80


def test_the_demo_measures_its_public_texts_only(told, monkeypatch):
    seen = []
    real = texts.examples
    monkeypatch.setattr(texts, "examples", lambda path, **columns: seen.append(path.name) or real(path, **columns))
    status, said, _err = told("fit-clips", "dp-sgd", "--examples", 8)
    assert (status, seen) == (0, ["public.jsonl"])
    assert "8 public texts (demo) on demo" in said


def test_a_group_that_keeps_its_clip_is_marked(told, home, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("rows:\n  - {layers: all, clip: 0.5, per: tensor}\n")
    status, said, _err = told("fit-clips", path, "--model", home / "model", "--data", home / "texts.jsonl")
    assert status == 0
    starred = [line.split()[0] for line in said.splitlines() if "0.5*" in line]
    assert starred == [f"block[{k}].attention.key.bias" for k in range(3)]
    assert "* 3 groups keep their clips: the gradient is zero" in said
    assert max(map(len, said[said.index("group ") : said.index("# clips")].splitlines())) <= 100


def test_figures_stay_whole_in_80_columns(told, words, monkeypatch):
    monkeypatch.setattr("dpguard.cli.fitting.console", lambda: type(console())(width=80, highlight=False))
    _status, said, _err = told(*words)
    shown = said[said.index("group ") : said.index("# clips")]
    assert max(map(len, shown.splitlines())) <= 80
    assert sum(line.rstrip().endswith(" %") for line in shown.splitlines()) == 6


def test_odd_names_survive_the_file(tmp_path):
    policy = Policy([{"layers": ["name:*.bias", "block[0]"], "clip": 1e-05, "noise": 0.1}], "a: b # ${HOME} é")
    path = tmp_path / "odd.yaml"
    path.write_text(as_yaml(policy, "clips of\nmodel x"), encoding="utf-8")
    found = Policy.load(path)
    assert (found.rows, found.name) == (policy.rows, policy.name)
    assert path.read_text(encoding="utf-8").startswith("# clips of model x\nname: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dp-sdg"], "dp-sgd"),
        (["missing.yaml"], "missing.yaml"),
        (["dp-sgd", "--model", "./nowhere"], "nowhere"),
        (["dp-sgd", "--data", "missing.jsonl"], "missing.jsonl"),
        (["dp-sgd", "--data", "{home}/texts.jsonl", "--label", "lable"], "'lable'; did you mean 'label'?"),
        (["dp-sgd", "--data", "{home}/texts.jsonl", "--text", "body"], "no column 'body'"),
        (["none"], "nothing to fit"),
        (["prune"], "nothing to fit"),
        (["dp-sgd", "--quantile", "0"], "quantile is 0.0; expected a number above 0 and below 1"),
        (["dp-sgd", "--quantile", "1"], "quantile is 1.0"),
        (["dp-sgd", "--quantile", "many"], "quantile"),
        (["dp-sgd", "--examples", "0"], "examples"),
        (["dp-sgd", "--out", "fitted.txt"], "ends in .yaml"),
        (["dp-sgd", "--out", "no/such/folder/fitted.yaml"], "folder that exists"),
        (["{policy}", "--out", "{policy}"], "the policy itself"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_status_two(told, home, policy, words, expected):
    status, out, err = told("fit-clips", *(word.format(home=home, policy=policy) for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("dpguard: ")
    assert len(err.splitlines()) == 1
    assert expected in err
    assert policy.read_text() == POLICY
