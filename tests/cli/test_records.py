from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from dpguard.study.record import Cell, Record, TextRow
from dpguard.study.store import Store

CELL = Cell("leakage", "none", [], {"name": "m"}, {"name": "d"}, {"at": "start"}, 0)
SCORE = {"target": 3, "attack": "span", "metrics": {"rougeL": 1.0}, "certain": True, "inherited": False}


@pytest.fixture
def folder(tmp_path):
    with Store.open(tmp_path / "s", create=True) as store:
        other = Cell("utility", "none", [], {"name": "m"}, {"name": "d"}, {}, 0)
        store.set_study("s", "", {"name": "s"}, [CELL, other])
        texts = [TextRow(3, "truth", "=my secret"), TextRow(3, "span", "my secret")]
        store.put(Record(CELL, "done", result={"scores": [SCORE]}), texts)
    return tmp_path / "s"


def test_export_writes_beside_the_records_and_says_what_is_missing(told, folder):
    status, out, err = told("records", "export", folder)
    assert (status, err) == (0, "")
    assert out == f"2 rows of 2 cells (1 missing): {folder / 'metrics.parquet'}\n"
    assert len(pd.read_parquet(folder / "metrics.parquet")) == 2


def test_the_ending_says_the_format(told, folder, tmp_path):
    assert told("records", "export", folder, "--out", tmp_path / "x.jsonl")[0] == 0
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["metric"] == "rougeL"


def test_texts_are_exported_only_when_asked_for(told, folder, tmp_path):
    plain, shown = tmp_path / "plain.csv", tmp_path / "shown.csv"
    assert told("records", "export", folder, "--what", "scores", "--out", plain)[0] == 0
    assert told("records", "export", folder, "--what", "scores", "--out", shown, "--show-text")[0] == 0
    assert "secret" not in plain.read_text()
    assert "'=my secret" in shown.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--to", "cvs"), "--to is 'cvs'; did you mean 'csv'?"),
        (("--what", "metric"), "what is 'metric'; did you mean 'metrics'?"),
        (("--show-text",), "the table of metrics holds no texts, expected what='scores' (--what scores)"),
    ],
)
def test_mistakes_are_one_sentence(told, folder, words, sentence):
    status, out, err = told("records", "export", folder, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


def test_answers_are_shared_without_texts(told, folder, tmp_path):
    status, out, err = told("records", "share", folder, "--out", tmp_path / "given" / "answers.sqlite")
    assert (status, err) == (0, "")
    assert out == f"1 answers without texts: {tmp_path / 'given' / 'answers.sqlite'}\n"
    for words in (("records", "export", "--what", "scores"), ("report",)):
        status, _, err = told(*words[:2], tmp_path / "given", *words[2:], "--show-text")
        assert (status, err.count("\n")) == (2, 1)
        assert "holds no texts to show" in err
    assert told("report", tmp_path / "given", "--out", tmp_path / "mine")[0] == 0
    assert (tmp_path / "mine" / "report.html").is_file()


def test_a_path_that_the_study_file_holds_is_told_before_it_is_passed_on(told, tmp_path):
    """An id is made of it, so that it cannot be cut: whoever shares the file must know."""
    cell = replace(CELL, data={"name": "/home/alice/clinic/notes.jsonl"}, model={"name": "minilm"})
    with Store.open(tmp_path / "s", create=True) as store:
        store.set_study("s", "", {"name": "s"}, [cell])
    status, out, err = told("records", "share", tmp_path / "s")
    assert (status, out[:9]) == (0, "0 answers")
    assert err.startswith("the study file names '/home/alice/clinic/notes.jsonl', and so do the answers;")
    assert err.count("\n") == 1
