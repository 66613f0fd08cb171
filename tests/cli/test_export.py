"""``dpguard export``: what it prints, and its mistakes."""

from __future__ import annotations

import json

import pytest

from tests.deploy import records


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    return records.study(place / "s", records.home(place / "h"))


def test_the_recommended_policy_is_exported_and_said(study, told, tmp_path):
    status, said, err = told("export", study, "--to", "flower", "--out", tmp_path / "e")
    assert (status, err) == (0, "")
    assert "dp for flower: a gradient a round, 8 rounds, epsilon 3.44" in said
    assert (tmp_path / "e" / "card.md").is_file()
    status, said, err = told("export", study, "--to", "opacus", "--policy", "none", "--out", tmp_path / "o", "--json")
    assert status == 0, err
    plain = json.loads(said)
    assert plain["epsilon"] == "inf"
    assert any("infinite" in warning for warning in plain["warnings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "flwr"), "unknown framework 'flwr'; did you mean 'flower'?"),
        (("--to", "flower", "--policy", "dpp"), "no policy of this study is called 'dpp'; did you mean 'dp'?"),
        ((), "Missing option '--to'"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(words, message, study, told, tmp_path):
    status, said, err = told("export", study, *words, "--out", tmp_path / "e")
    assert (status, said) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_no_records(told, tmp_path):
    status, _said, err = told("export", tmp_path, "--to", "flower")
    assert status == 2
    assert "holds no records" in err
