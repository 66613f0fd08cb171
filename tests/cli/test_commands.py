"""The commands on a small real model: what they print, and that running again does only what is missing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from dpguard.cli.look import attacks_of
from dpguard.measure.threat import Threat
from tests.cli.conftest import write_study as study

COLUMNS = (
    "policy,leakage,leakage_low,leakage_high,leakage_metric,attack,utility,utility_low,utility_high,"
    "epsilon,shared_fraction,on_front"
)


def test_help_and_lists_do_not_import_torch():
    code = (
        "import sys; sys.argv = ['dpguard', *%r]\n"
        "from dpguard.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'opacus', 'transformers', 'seaborn', 'rouge_score'} & set(sys.modules), sys.modules"
    )
    for words in (
        ["--help"],
        ["list", "policies"],
        ["list", "attacks"],
        ["list", "metrics"],
        ["list", "columns"],
        ["list", "keys"],
    ):
        done = subprocess.run([sys.executable, "-c", code % words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "dp-sgd" in done.stdout or words != ["list", "policies"]


def test_without_studies_the_list_says_where_they_are(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "they come with the repository" in told("list", "studies")[1]


def test_help_has_no_escapes():
    done = subprocess.run(
        [sys.executable, "-m", "dpguard", "attack", "--help"], capture_output=True, text=True, check=True
    )
    assert "[default: demo]" in done.stdout
    assert "\\" not in done.stdout


def test_a_study_from_file_to_decision(home, told, tmp_path):
    out = tmp_path / "out"
    path = study(
        home, tmp_path,
        ("privacy:", "recommend: {max_epsilon: 1000}\nprivacy:"),
        ("rows]", "rows, span]"),
        ("targets: 2", "targets: 6, at: [start, end]"),
    )  # fmt: skip
    status, said, _err = told("run", path, "--out", out, "--workers", "2")
    assert status == 0, said
    assert "report:" in said
    with (out / "frontier.csv").open() as file:
        assert file.readline().strip() == COLUMNS
        file.seek(0)
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"none", "dp-sgd noise=0.5"}
    assert float(rows["none"]["leakage"]) > 0.95
    assert float(rows["dp-sgd noise=0.5"]["leakage"]) < 0.6
    assert rows["none"]["epsilon"] == "inf"
    assert 0 < float(rows["dp-sgd noise=0.5"]["epsilon"]) < 1000
    assert (out / "report.html").read_text().startswith("<!doctype html>") or "<html" in (
        out / "report.html"
    ).read_text()
    page = (out / "report.html").read_bytes()

    status, again, _err = told("run", path, "--out", out, "--workers", "2")
    assert status == 0
    assert "from an earlier run" in again
    assert (out / "report.html").read_bytes() == page, "rebuilt byte for byte"
    (out / "report.pdf").write_text("of an earlier report")
    assert told("report", out)[0] == 0
    assert (out / "report.html").read_bytes() == page
    assert not (out / "report.pdf").exists(), "it may say something else than the page beside it"
    status, said, _err = told("recommend", out, "--max-leakage", "0.9", "--json")
    assert status == 0
    assert json.loads(said)["verdict"]
    (tmp_path / "file").write_text("")
    for words in (("report", out), ("card", out, "--policy", "none")):
        status, _said, err = told(*words, "--out", tmp_path / "file")
        assert (status, err.count("\n")) == (2, 1), err
        assert f"{tmp_path / 'file'}" in err
        assert "cannot be written (" in err


def test_the_caps_of_the_study_hold_beside_the_given_ones(told, tmp_path):
    from dpguard.study.store import Store
    from tests.report.made_up_study import sample

    result = sample(20)
    spec = {**result.spec, "recommend": {"max_leakage": 0.5, "max_epsilon": 7}}
    cells = [record.cell for record in result.records]
    with Store.open(tmp_path, create=True) as store:
        store.set_study("made-up", "name: made-up\n", spec, cells)
        store.put_all((record, ()) for record in result.records)
    asked = {}
    for given in ((), ("--max-leakage", "0.4"), ("--max-leakage", "0.4", "--max-epsilon", "inf")):
        status, said, _err = told("recommend", tmp_path, *given, "--json")
        assert status == 0
        asked[given] = json.loads(said)["caps"]
    assert [list(caps.values()) for caps in asked.values()] == [
        [0.5, None, 7.0], [0.4, None, 7.0], [0.4, None, None],
    ]  # fmt: skip
    said = told("recommend", tmp_path, "--max-leakage", "0.4")[1]
    assert "The study's own caps hold beside yours: epsilon at most 7." in said


def test_private_text_is_not_in_the_report_unless_asked_for(home, told, tmp_path):
    path = study(home, tmp_path, ("utility: {epochs: 1, batch_size: 8}\n", ""))
    first = json.loads((home / "texts.jsonl").read_text().splitlines()[0])["text"]
    texts = [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]
    assert told("run", path, "--out", tmp_path / "a", "--workers", "1")[0] == 0
    assert told("run", path, "--out", tmp_path / "b", "--workers", "1", "--show-text")[0] == 0
    hidden, shown = ((tmp_path / x / "report.html").read_text() for x in "ab")
    assert not any(text in hidden for text in texts), first
    assert any(text in shown for text in texts)


def test_a_failed_cell_is_a_record_and_the_study_goes_on(home, told, tmp_path, monkeypatch):
    monkeypatch.setattr("dpguard.cli.studies.EXECUTE", f"{__file__.replace('test_commands', 'failing_legs')}:execute")
    path = study(home, tmp_path)
    status, said, _err = told("run", path, "--out", tmp_path / "out", "--workers", "1")
    assert status == 1
    assert "failed: utility, none, seed 0" in said
    assert "the moon was in the way" in said
    page = (tmp_path / "out" / "report.html").read_text()  # of private texts, which an error may quote
    assert "the moon was in the way" not in page
    assert "whose words may quote a text: dpguard show prints them" in page
    monkeypatch.undo()
    # what failed stays until it is asked for, and can be looked at
    status, said, _err = told("status", tmp_path / "out")
    assert status == 0
    assert "1 failed · 0 running · 0 left" in said
    assert "the moon was in the way" in said
    status, said, _err = told("show", tmp_path / "out", "failed")
    assert status == 0
    assert "Traceback (most recent call last)" in said
    assert "failed utility, none, seed 0" in said
    status, said, _err = told("show", tmp_path / "out", "skipped")
    assert (status, said.count("is skipped")) == (0, 1)
    # the fault is gone: only what failed runs again
    status, said, _err = told("run", path, "--out", tmp_path / "out", "--workers", "1", "--retry-failed")
    assert status == 0, said


def test_dry_run_shows_the_grid_and_runs_nothing(home, told, tmp_path):
    status, said, _err = told("run", study(home, tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert status == 0
    assert "dp-sgd noise=0.5" in said
    assert "inf" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_in_a_folder_that_is_there_leaves_it_as_it_is(home, told, tmp_path, monkeypatch):
    monkeypatch.setattr("dpguard.cli.studies.print_estimate", lambda *_: None)
    aim = ("    sweep: {noise: [0.5]}\n", "    epsilon: 3\n"), ("noise: $noise", "noise: 1.0")
    (tmp_path / "out").mkdir()
    asked = ("--out", tmp_path / "out", "--dry-run")
    status, said, _err = told("run", study(home, tmp_path, *aim), *asked)
    assert (status, "6 cells, 6 to run" in said, list((tmp_path / "out").iterdir())) == (0, True, [])


def test_attack_json(home, told):
    where = ("--model", home / "model", "--data", home / "texts.jsonl")
    status, said, _err = told("attack", *where, "--policy", "none", "--targets", "2", "--json")
    found = json.loads(said)
    assert status == 0
    assert set(found["metrics"]) == {"exact_match", "rouge1", "rouge2", "rougeL", "token_recall"}
    assert found["metrics"]["exact_match"] == 1.0
    assert len(found["targets"]) == 2
    assert all({"exact_match", "seconds", "certain"} <= set(t) and t["certain"] for t in found["targets"])
    status, said, _err = told("attack", *where, "--policy", "none", "--targets", "1")
    assert "true" in said
    assert "recovered" in said
    assert "certain" in said


def test_attack_under_another_threat(home, told):
    where = ("--model", home / "model", "--data", home / "texts.jsonl", "--targets", "1", "--json", "--attack", "rows")
    two = ("--clients", "2", "--local-steps", "2", "--learning-rate", "0.001", "--know", "labels", "--mode", "eval")
    status, said, _err = told("attack", *where, "--policy", "none", *two)
    found = json.loads(said)
    assert status == 0
    assert len(found["targets"]) == 2, "one text of each client"
    assert 0.2 < found["metrics"]["token_recall"] <= 1, "one bag for both"
    assert not any(target["certain"] for target in found["targets"])


def test_attack_where_nothing_is_known(home, told, monkeypatch):
    asked = []
    monkeypatch.setattr("dpguard.cli.look.attack_once", lambda *_, **more: asked.append(more["threat"].know))
    for words in ((), ("--know", "nothing"), ("--know", "labels")):
        assert told("attack", *words)[0] == 0
    assert asked == [("count",), (), ("labels",)]


def test_attack_in_a_closed_world(home, told):
    where = ("--model", home / "model", "--data", home / "texts.jsonl", "--targets", "1", "--json")
    status, said, _err = told("attack", *where, "--policy", "none", "--attack", "likelihood", "--candidates", "5")
    [found] = json.loads(said)["targets"]
    assert (status, found["attack"], found["exact_match"], found["certain"]) == (0, "likelihood", 1.0, True)


def test_the_panel_of_a_closed_world_reads_the_candidates():
    assert attacks_of("demo", None, Threat(candidates=9)) == ["rows", "span", "match:demo", "likelihood", "combined"]
    assert attacks_of("demo", None) == ["rows", "span", "match:demo", "combined"]


def test_guarantee_json(home, told):
    common = ("--model", home / "model", "--sampling-rate", "0.01", "--steps", "1000", "--json")
    found = json.loads(told("guarantee", "dp-sgd", *common)[1])
    assert found["epsilon"] == pytest.approx(3.15, abs=0.02)
    assert found["sigma_eff"] == pytest.approx(0.8)
    assert "one example" in found["statement"]
    bare = json.loads(told("guarantee", "none", *common)[1])
    assert bare["epsilon"] == "inf"
    assert bare["bound"]["success"] is None


def test_guarantee_calibrates_the_noise_to_a_target(home, told):
    common = ("--model", home / "model", "--sampling-rate", "0.01", "--steps", "1000", "--target-epsilon", "2")
    status, said, _err = told("guarantee", "clip-only", *common, "--json")
    found = json.loads(said)
    assert status == 0
    assert 1.98 <= found["epsilon"] <= 2
    assert found["rows"] == [{"layers": "all", "clip": 1.0, "noise": pytest.approx(found["sigma_eff"])}]
    assert "noise: " in told("guarantee", "clip-only", *common)[1]
    status, _said, err = told("guarantee", "none", *common)
    assert status == 2
    assert "no noise reaches epsilon 2: gradients leave without clip and noise" in err


def test_layers_and_doctor(home, told):
    status, said, _err = told("layers", home / "model")
    assert status == 0
    assert "block[2].mlp.out" in said
    rows = json.loads(told("layers", home / "model", "--json")[1])
    assert sum(row["fraction"] for row in rows) == pytest.approx(1.0)
