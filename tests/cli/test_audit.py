"""``dpguard audit``: a table with figures, one line, and an exit status."""

from __future__ import annotations

import json

import pytest

from tests.engine.audit import planted


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "P.yaml"
    path.write_text("name: mine\nrows:\n  - {layers: all, clip: 1.0, noise: 0.8}\n  - {layers: head, noise: 2.0}\n")
    return path


def test_a_policy_that_holds(told, policy):
    status, said, err = told("audit", policy)
    assert (status, err) == (0, "")
    assert "checks pass" in said.splitlines()[-1]
    assert max(map(len, said.splitlines())) <= 100
    assert {line[0] for line in said.splitlines() if line} >= set("SNEWPA")


def test_json_through_a_model(told, home, policy):
    status, said, _err = told("audit", policy, "--model", home / "model", "--json", "--seed", 3)
    assert status == 0
    found = json.loads(said)
    assert found["ok"] is True
    assert found["seed"] == 3
    assert any("real texts" in row["what"] for row in found["rows"])
    assert {row["verdict"] for row in found["rows"]} == {"pass"}


def test_wrong_noise_is_exit_status_one(told, policy, monkeypatch):
    monkeypatch.setattr("dpguard.engine.audit.run.of_the_engine", planted.FivePerCentInOneGroup)
    status, said, _err = told("audit", policy)
    assert status == 1
    assert "FAILS" in said.splitlines()[-1]
    assert "0.95" in said


def test_no_guarantee_is_said_so(told):
    status, said, _err = told("audit", "prune")
    assert status == 0
    assert "epsilon = inf" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["audit", "dp-sdg"], "dp-sgd"),
        (["audit", "dp-sgd", "--model", "./nowhere"], "nowhere"),
        (["audit", "dp-sgd", "--batch-size", "0"], "batch-size"),
        (["audit", "dp-sgd", "--batch-size", "100000000000"], "from 1 to 4096"),
        (["audit", "dp-sgd", "--seed", "-1"], "seed"),
        (["audit", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_status_two(told, words, expected):
    status, out, err = told(*words)
    assert (status, out) == (2, "")
    assert err.startswith("dpguard: ")
    assert len(err.splitlines()) == 1
    assert expected in err
