"""A tiny grid on a folder of BERT-base's size, from the file to the report."""

from __future__ import annotations

import csv
import sys

import pytest

from dpguard.cli.main import main
from tests import bert_base

STUDY = """\
name: base
question: Does a study run at BERT-base's size?
model: ${DPGUARD_MODEL:-minilm}
data: demo
policies:
  query: block[0].attention.query
  last-block-dp:
    epsilon: 8
    rows:
      - {layers: all, train: false, share: false}
      - {layers: "block[-1]", train: true, share: true, clip: 0.1}
leakage: {panel: panel-1, attacks: [prior, rows, span], targets: 1, at: [start, tuned]}
utility: {epochs: 1, batch_size: 16, train_examples: 16}
privacy: {delta: 1.0e-3}
"""


@pytest.mark.slow
def test_a_tiny_grid_at_the_size_of_bert_base(tmp_path, monkeypatch):
    folder = bert_base.make(tmp_path / "bert-base")
    (tmp_path / "study.yaml").write_text(STUDY)
    monkeypatch.setenv("DPGUARD_MODEL", str(folder))
    command = ["dpguard", "run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    with (tmp_path / "out" / "frontier.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"none", "query", "last-block-dp"}
    assert 0.004 < float(rows["query"]["shared_fraction"]) < 0.007  # .54 % of the parameters, as in the seed paper
    assert float(rows["query"]["leakage"]) == 1
    assert 7.9 <= float(rows["last-block-dp"]["epsilon"]) <= 8
