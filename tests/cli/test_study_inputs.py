"""What goes wrong with the model and the texts of a study: one sentence, exit status 2, nothing begun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dpguard.cli.planning import plan_study, read_ground
from dpguard.cli.warned import warnings
from dpguard.errors import UserError
from dpguard.study import corpora
from dpguard.study.resume import check_inputs
from dpguard.study.spec import Study
from dpguard.study.store import Store
from tests.cli.conftest import write_study
from tests.cli.test_bad_input import one_sentence

STUDIES = Path(__file__).resolve().parents[2] / "studies"


def test_a_data_folder_without_the_expected_files(told, tmp_path, monkeypatch):
    monkeypatch.setenv("DPGUARD_DATA", str(tmp_path))
    path = STUDIES / "which-part-leaks.yaml"
    one_sentence(told("run", path, "--out", tmp_path / "out"), "which-part-leaks.yaml:", "cola.train.jsonl", "expected")
    (tmp_path / "cola.train.jsonl").write_text(json.dumps({"text": "He left.", "label": 1}) + "\n")
    one_sentence(told("run", path, "--out", tmp_path / "out"), "which-part-leaks.yaml:", "cola.validation.jsonl")
    monkeypatch.delenv("DPGUARD_DATA")
    one_sentence(told("run", path), "environment variable DPGUARD_DATA is not set")
    assert not (tmp_path / "out").exists()


def test_a_column_of_another_name_is_told_with_how_to_name_it(home, told, tmp_path):
    file = tmp_path / "texts.csv"
    file.write_text("sentence,label\n" + "".join(f"w{i} w{i + 1},{i % 2}\n" for i in range(40)))
    path = write_study(home, tmp_path, (str(home / "texts.jsonl"), str(file)))
    named = "(name it with data: {path: ..., text: sentence})"
    one_sentence(told("run", path, "--out", tmp_path / "out"), "texts.csv:1: no column 'text'", named)
    for command in (("attack",), ("fit-clips", "dp-sgd")):
        answer = told(*command, "--model", home / "model", "--data", file)
        one_sentence(answer, "texts.csv:1: no column 'text'", "(name it with --text sentence)")
    file.write_text("text\n" + "".join(f"w{i} w{i + 1}\n" for i in range(40)))
    one_sentence(told("run", path), "texts.csv:1: no column 'label'; expected one of: text\n")


def test_a_label_that_the_models_head_has_no_class_for(home, told, tmp_path):
    """The head was drawn again, of three classes, and everything measured on that."""
    rows = [json.loads(line) for line in (home / "texts.jsonl").read_text().splitlines()]
    rows = [{**row, "label": 2 if i in (30, 40, 50, 60) else row["label"]} for i, row in enumerate(rows)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_study(home, tmp_path, (str(home / "texts.jsonl"), str(file)))
    said = "label is 2, and the model's head has 2 classes; expected 0 or 1 (or a checkpoint without a head)"
    one_sentence(told("run", path, "--out", tmp_path / "out"), "texts.jsonl:", said)
    for command in (("attack",), ("fit-clips", "dp-sgd")):
        one_sentence(told(*command, "--model", home / "model", "--data", file), "texts.jsonl:", said)


def test_texts_of_one_class_are_warned_of(home, tmp_path):
    rows = [json.loads(line) for line in (home / "texts.jsonl").read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({**row, "label": 1}) + "\n" for row in rows))
    path = write_study(home, tmp_path, (str(home / "texts.jsonl"), str(tmp_path / "texts.jsonl")))
    study = Study.load(path)
    (said,) = warnings(study, read_ground(study))
    assert said.startswith("all 54 training texts have label 1: a model that always answers it")
    study = Study.load(write_study(home, tmp_path))
    assert warnings(study, read_ground(study)) == []


def test_a_model_folder_without_a_tokenizer(home, told, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    path = write_study(home, tmp_path, (str(home / "model"), str(tmp_path / "model")))
    one_sentence(
        told("run", path, "--out", tmp_path / "out"), "study.yaml:2:", "has no tokenizer; expected tokenizer.json"
    )


def test_a_study_resumed_with_other_texts_or_weights(home, told, tmp_path):
    shutil.copy(home / "texts.jsonl", tmp_path / "texts.jsonl")
    path = write_study(home, tmp_path, (str(home / "texts.jsonl"), str(tmp_path / "texts.jsonl")))
    study, out = Study.load(path), tmp_path / "out"
    cells = plan_study(study, out).cells
    out.mkdir(exist_ok=True)
    check_inputs(study, out, cells)
    with Store.open(out, create=True) as store:
        store.set_study(study.name, study.text, study.plain(), cells)
    check_inputs(study, out, cells)
    rows = (tmp_path / "texts.jsonl").read_text().splitlines()
    (tmp_path / "texts.jsonl").write_text("\n".join(rows[1:]) + "\n")
    corpora.load_corpus.cache_clear()  # another process reads the file again
    one_sentence(told("run", path, "--out", out), "study.yaml:", "other texts", "expected the same, or another --out")
    others = [replace(cell, model={**cell.model, "hash": "else"}) for cell in cells]
    with pytest.raises(UserError, match="other weights"):
        check_inputs(study, out, others)
    path.write_text(path.read_text().replace("targets: 2", "targets: 3"))
    check_inputs(Study.load(path), out, others)  # another study: its cells are new ones


READ = """
import sys
from dpguard.cli.planning import read_ground
from dpguard.errors import UserError
from dpguard.study.spec import Study
try:
    read_ground(Study.load(sys.argv[1]))
except UserError as error:
    print(error, "torch" in sys.modules)
"""


def test_a_mistake_in_the_texts_is_told_before_torch_is_there(tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"sentence": "a nurse called", "label": 0}) + "\n")
    text = "name: s\nmodel: demo\ndata: {path: texts.jsonl}\npolicies: {none: }\nutility: {}\n"
    (tmp_path / "study.yaml").write_text(text)
    command = [sys.executable, "-c", READ, str(tmp_path / "study.yaml")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "no column 'text'" in done.stdout
    assert done.stdout.endswith(" False\n")


def test_where_the_texts_lie_is_no_part_of_a_cell(home, tmp_path, monkeypatch):
    ids = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(home / "texts.jsonl", tmp_path / place / "texts.jsonl")
        monkeypatch.setenv("PLACE", str(tmp_path / place))
        path = write_study(home, tmp_path, (str(home / "texts.jsonl"), "${PLACE}/texts.jsonl"))
        cells = plan_study(Study.load(path), tmp_path / "out").cells
        assert cells[0].data["name"] == "texts.jsonl"
        ids.append([cell.id for cell in cells])
    assert ids[0] == ids[1]


def test_where_the_model_lies_is_no_part_of_a_cell_either(home, tmp_path, monkeypatch):
    """Moved to another machine a study goes on, and shards from two of them merge."""
    ids = []
    for place in ("here", "there"):
        shutil.copytree(home / "model", tmp_path / place / "model")
        monkeypatch.setenv("PLACE", str(tmp_path / place))
        path = write_study(home, tmp_path, (str(home / "model"), "${PLACE}/model"))
        cells = plan_study(Study.load(path), tmp_path / "out").cells
        assert cells[0].model["name"] == "model"
        ids.append([cell.id for cell in cells])
    assert ids[0] == ids[1]
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert Study.load(path).model_name == "model"
    text = path.read_text().replace("${PLACE}/model", "${PLACE}")
    for name in ("minilm", "google/bert_uncased", "minilm+lora8"):
        monkeypatch.setenv("PLACE", name)
        path.write_text(text)
        assert Study.load(path).model_name == name  # as always: it says what it is, not where


def test_texts_that_the_tokenizer_cannot_read_are_told(home, told, tmp_path):
    """Every such word is one token, which whoever guesses it once has recovered everywhere."""
    rows = [json.loads(line) for line in (home / "texts.jsonl").read_text().splitlines()]
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({**row, "text": row["text"] + f" палата {i}"}) + "\n" for i, row in enumerate(rows))
    )
    path = write_study(home, tmp_path, (str(home / "texts.jsonl"), str(file)))
    status, _out, err = told("run", path, "--out", tmp_path / "out", "--dry-run")
    assert status == 0
    assert "% of the texts' tokens are unknown to the model's tokenizer" in err
    _, _, before = told("run", write_study(home, tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert "unknown to the model's tokenizer" not in before


def test_held_out_texts_that_are_trained_on_are_told(home, told, tmp_path):
    first = (home / "texts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(first[:2]) + '{"text": "w9 w8 w7", "label": 1}\n')
    path = write_study(home, tmp_path, ("policies:", f"  test: {tmp_path / 'test.jsonl'}\npolicies:"))
    status, _out, err = told("run", path, "--out", tmp_path / "out", "--dry-run")
    assert status == 0
    assert "of the 3 held-out texts 2 are training texts as well" in err
