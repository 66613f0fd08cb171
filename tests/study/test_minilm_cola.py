"""A cut of studies/minilm-cola.yaml: the pretrained MiniLM on real sentences, 6 targets, 128 training texts."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import yaml

from dpguard.cli.main import main
from dpguard.study.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study(data_folder, minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    content = yaml.safe_load((ROOT / "studies" / "minilm-cola.yaml").read_text())
    content["leakage"] |= {"targets": 6, "attacks": ["prior", "span"]}
    content["utility"] |= {"train_examples": 128, "epochs": 1}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    patch = pytest.MonkeyPatch()
    patch.setenv("DPGUARD_DATA", str(data_folder))
    patch.setattr(sys, "argv", ["dpguard", "run", str(folder / "study.yaml"), "--out", str(folder / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    patch.undo()
    assert stop.value.code == 0
    assert (folder / "out" / "report.html").stat().st_size > 10_000
    return folder / "out"


@pytest.fixture(scope="module")
def frontier(study):
    with (study / "frontier.csv").open() as file:
        return {row["policy"]: row for row in csv.DictReader(file)}


def test_every_figure_is_finite(frontier):
    assert set(frontier) == {"none", "dp-sgd", "only-block3-query", "upper-blocks"}
    for row in frontier.values():
        for column in ("leakage", "leakage_low", "leakage_high", "utility", "utility_low", "utility_high"):
            assert math.isfinite(float(row[column])), (row["policy"], column)
    assert math.isfinite(float(frontier["dp-sgd"]["epsilon"]))
    assert {frontier[n]["epsilon"] for n in ("none", "only-block3-query", "upper-blocks")} == {"inf"}


def test_one_deep_matrix_gives_the_sentence_back(frontier):
    # rougeL is 1 exactly where the tokens are; the seed paper's loop reaches .66 on this matrix
    assert float(frontier["only-block3-query"]["leakage"]) >= 0.8
    assert float(frontier["dp-sgd"]["leakage"]) < 0.35
    assert float(frontier["only-block3-query"]["shared_fraction"]) < 0.01


def test_exact_match_from_block_3s_query_alone(study):
    with Store.open(study) as store:
        record = next(r for r in store.records() if (r.cell.leg, r.cell.policy) == ("leakage", "only-block3-query"))
    found = [score for score in record.result["scores"] if score["attack"] == "span"]
    assert len(found) == 6
    assert sum(s["metrics"]["exact_match"] for s in found) >= 5
    assert not any(s["certain"] and not s["metrics"]["exact_match"] for s in found)
