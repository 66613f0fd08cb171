"""Records as tables: every cell is there, intervals are those of `stats`, texts stay where they are,
files read back.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import dpguard
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.report import tidy
from dpguard.report.export import kind_of, write
from dpguard.report.utility import judge
from dpguard.stats import binomial, mean_interval
from dpguard.study.record import Cell, Record
from dpguard.study.spec import Study
from dpguard.study.store import FILE, Store
from tests.report import made_up_study

PRIVATE = "Ada Moreau"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_up_study.sample(12, synthetic=False)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """The made-up study in a store; one more cell has not run, and one attack was skipped."""
    folder = tmp_path_factory.mktemp("made")
    left = Cell("utility", "mixture", [], made_up_study.MODEL, made_up_study.DATA, {"epochs": 9}, 7)
    values = {f"dp-sgd noise={n}": {"entry": "dp-sgd", "values": {"noise": float(n)}} for n in ("0.3", "0.6")}
    spec = {**made.spec, "sweeps": values}
    with Store.open(folder, create=True) as store:
        store.set_study("sample", made_up_study.YAML, spec, [*(r.cell for r in made.records), left])
        for record in made.records:
            if record.cell.policy == "prune" and record.cell.leg == "leakage":
                record.result["skipped"] = {"span": "=no layer to read"}
            store.put(record, made.texts.get(record.cell.id, ()))
    return folder


@pytest.fixture(scope="module")
def table(folder):
    return dpguard.load(folder)


def test_no_cell_is_dropped(made, table):
    assert table["id"].nunique() == len(made.records) + 1
    per_cell = table.drop_duplicates("id").set_index("id")
    for record in made.records:
        assert per_cell.loc[record.cell.id, "policy"] == record.cell.policy
    assert per_cell.status.value_counts().to_dict() == {"done": 74, "skipped": 3, "failed": 1, "missing": 1}
    for status, reason in (("failed", "out of memory: 3.1 GB asked for, 1.9 GB free"), ("missing", None)):
        [row] = table[table.status == status].to_dict("records")
        assert pd.isna(row["value"])
        assert pd.isna(row["metric"])
        assert row["reason"] == reason if reason else pd.isna(row["reason"])


def test_values_and_intervals_are_those_of_the_records(made, table):
    record = next(r for r in made.records if r.cell.leg == "leakage" and r.cell.policy == "prune")
    own = table[(table.id == record.cell.id) & (table.attack == "match")].set_index("metric")
    scores = [s for s in record.result["scores"] if s["attack"] == "match"]
    for metric in ("rougeL", "rouge2", "entity_recall"):
        known = [s["metrics"][metric] for s in scores if s["metrics"][metric] is not None]
        value, low, high, n = own.loc[metric, ["value", "low", "high", "n"]]
        assert value == pytest.approx(np.mean(known))
        assert low <= value <= high
        assert n == len(known)
    whole = mean_interval([s["metrics"]["rougeL"] for s in scores])
    assert tuple(own.loc["rougeL", ["value", "low", "high"]]) == pytest.approx((whole.value, whole.low, whole.high))
    exact = binomial(int(sum(s["metrics"]["exact_match"] for s in scores)), len(scores))
    assert tuple(own.loc["exact_match", ["value", "low", "high"]]) == (exact.value, exact.low, exact.high)
    record = next(r for r in made.records if r.cell.leg == "utility" and r.status == "done")
    row = table[(table.id == record.cell.id) & (table.metric == "accuracy")].iloc[0]
    expected = judge([record.result["predictions"]], record.result["labels"]).interval()
    assert (row.value, row.low, row.high, row.n) == (expected.value, expected.low, expected.high, 400)


def test_every_row_knows_its_policys_epsilon_and_sweep_values(made, table):
    rows = table[table.policy == "dp-sgd noise=0.6"]
    assert set(rows.leg) == {"guarantee", "leakage", "utility"}
    assert set(rows.entry) == {"dp-sgd"}
    assert set(rows.epsilon) == {6.31}
    assert set(rows.sweep_noise) == {0.6}
    assert set(table[table.policy == "none"].epsilon) == {np.inf}
    assert table[table.policy == "none"].sweep_noise.isna().all()
    assert set(table[table.policy == "none"].entry) == {"none"}


def test_a_skipped_attack_is_a_row_with_its_reason(table):
    rows = table[(table.policy == "prune") & (table.status == "skipped")]
    assert set(rows.attack) == {"span"}
    assert set(rows.reason) == {"=no layer to read"}
    assert rows.value.isna().all()


def test_scores_are_one_row_a_target_attack_and_metric(made, folder):
    scores = dpguard.load(folder, "scores")
    counted = sum(len(s["metrics"]) for r in made.records if r.status == "done" for s in r.result.get("scores", ()))
    assert scores.status.value_counts().to_dict() == {"done": counted, "failed": 1}
    assert {"truth", "recovered"}.isdisjoint(scores.columns)
    record = next(r for r in made.records if r.cell.leg == "leakage" and r.status == "done")
    own = scores[(scores.id == record.cell.id) & (scores.metric == "rougeL") & (scores.attack == "span")]
    assert own.value.tolist() == [s["metrics"]["rougeL"] for s in record.result["scores"] if s["attack"] == "span"]


def test_a_score_has_its_own_cost_and_the_cell_another(tmp_path):
    cell = Cell("leakage", "none", [], {"name": "m"}, {"name": "d"}, {"at": "start"}, 0)
    about = {"target": 3, "metrics": {"rougeL": 1.0, "exact_match": 1.0}, "certain": True, "inherited": False}
    spent = {"span": (0.25, 7, 40), "match": (2.0, 300, 0)}
    scores = [
        {**about, "attack": attack, "seconds": seconds, "steps": steps, "candidates": candidates}
        for attack, (seconds, steps, candidates) in spent.items()
    ]
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "", {"name": "s"}, [cell])
        store.put(Record(cell, "done", result={"scores": scores}, provenance={"seconds": 9.5}))
    write(dpguard.load(tmp_path, "scores"), tmp_path / "t.parquet", "parquet")
    found = pd.read_parquet(tmp_path / "t.parquet")
    assert len(found) == 4
    for attack, rows in found.groupby("attack"):
        assert set(zip(rows.attack_seconds, rows.steps, rows.candidates, strict=True)) == {spent[attack]}
    assert set(found.cell_seconds) == set(dpguard.load(tmp_path).cell_seconds) == {9.5}
    assert "seconds" not in found


def test_texts_come_only_when_asked_for(folder, tmp_path):
    for what in tidy.WHAT:
        frame = dpguard.load(folder, what)
        for kind in ("csv", "jsonl", "parquet"):
            write(frame, tmp_path / f"t.{kind}", kind)
            assert PRIVATE.encode() not in (tmp_path / f"t.{kind}").read_bytes()
    shown = dpguard.load(folder, "scores", show_text=True)
    assert shown.truth.str.contains(PRIVATE).any()
    assert (shown[shown.metric == "exact_match"].query("value == 1").eval("truth == recovered")).all()
    with pytest.raises(UserError, match="the table of metrics holds no texts"):
        dpguard.load(folder, show_text=True)


def test_the_files_hold_the_table(table, tmp_path):
    for kind in ("parquet", "csv", "jsonl"):
        write(table, tmp_path / f"t.{kind}", kind)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    csv = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=[""])
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert list(csv.columns) == list(lines[0]) == list(table.columns)
    for name in ("value", "low", "high", "epsilon", "sweep_noise"):
        np.testing.assert_array_equal(csv[name].to_numpy(float), table[name].to_numpy())
        found = [np.nan if row[name] is None else float(row[name]) for row in lines]
        np.testing.assert_array_equal(found, table[name].to_numpy())
    assert next(row["epsilon"] for row in lines if row["policy"] == "none") == "inf"
    assert [row["policy"] for row in lines] == table.policy.tolist()
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_csv_cells_that_a_spreadsheet_would_run_are_disarmed(table, tmp_path):
    write(table, tmp_path / "t.csv", "csv")
    assert ",'=no layer to read," in (tmp_path / "t.csv").read_text()
    names = pd.DataFrame({"policy": pd.array(["=1+1", "@x", "+y", "-z", "-0.5", "ok"], dtype="string")})
    write(names, tmp_path / "n.csv", "csv")
    assert (tmp_path / "n.csv").read_text().split() == ["policy", "'=1+1", "'@x", "'+y", "'-z", "-0.5", "ok"]


def test_sweeps_of_texts_and_lists_are_texts(tmp_path):
    text = """\
name: s
model: demo
data: demo
policies:
  a: {sweep: {where: [head, [pooler, head]]}, rows: [{layers: $where, share: false}]}
leakage: {targets: 1}
"""
    study = Study.read(Document.parse(text))
    cells = study.cells(made_up_study.MODEL, made_up_study.DATA)
    with Store.open(tmp_path, create=True) as store:
        store.set_study(study.name, text, study.plain(), cells)
    frame = dpguard.load(tmp_path)
    assert frame.sweep_where.dropna().unique().tolist() == ["head", "pooler, head"]
    write(frame, tmp_path / "t.parquet", "parquet")


def test_a_federations_global_model_has_rows_of_its_own(tmp_path):
    cell = Cell("utility", "none", [], {"name": "m"}, {"name": "d"}, {}, 0)
    scores = {"accuracy": 0.5, "loss": 1.0}
    result = {"metrics": scores, "predictions": [0, 1], "labels": [0, 0],
              "federation": {"global": scores, "personal": {"mean": scores, "worst_tenth": scores, "clients": 3},
                             "bytes": 10, "bytes_per_round": 5}}  # fmt: skip
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "", {"name": "s"}, [cell])
        store.put(Record(cell, "done", result=result))
    found = dpguard.load(tmp_path).set_index("metric").value.to_dict()
    assert found["global_accuracy"] == found["worst_tenth_accuracy"] == 0.5
    assert (found["bytes"], found["bytes_per_round"]) == (10, 5)


def test_loading_needs_no_torch(folder):
    code = (
        f"import sys, dpguard; frame = dpguard.load({str(folder)!r}); assert len(frame)\n"
        "assert not {'torch', 'opacus', 'transformers', 'seaborn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_sentences(folder, tmp_path, table):
    with pytest.raises(UserError, match="what is 'score'; did you mean 'scores'"):
        dpguard.load(folder, "score")
    with pytest.raises(UserError, match="holds no records"):
        dpguard.load(tmp_path)
    with pytest.raises(UserError, match="did you mean 'csv'"):
        kind_of(None, "csvv")
    with pytest.raises(UserError, match=r"expected a name that ends in \.parquet"):
        kind_of(tmp_path / "x.xlsx", None)
    with pytest.raises(UserError, match="would replace the records themselves"):
        write(table, folder / FILE, "csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(table, tmp_path / "file" / "x.csv", "csv")
