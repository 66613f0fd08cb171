"""What a new user gets wrong: exit status 2, one sentence, the place, the value, what was expected."""

from __future__ import annotations

import json

import pytest

from dpguard.study.store import Store
from tests import tiny
from tests.cli.conftest import write_study as study


def one_sentence(result, *parts):
    status, _out, err = result
    assert status == 2, err
    assert err.startswith("dpguard: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("layers: all", "layres: all", 9, "did you mean 'layers'?"),
        ("epochs: 1", "epoch: 1", 11, "did you mean 'epochs'?"),
        (
            "  dp-sgd:\n    sweep: {noise: [0.5]}\n    rows:\n      - {layers: all, clip: 1.0, noise: $noise}",
            "  dp-sdg:",
            6,
            "did you mean 'dp-sgd'?",
        ),
        ("privacy:", "utility: {epochs: 2}\nprivacy:", 12, "twice"),
        ("layers: all", "layers: [all, 'block[7]']", 9, "it has blocks 0 to 2"),
        (
            "sweep: {noise: [0.5]}\n    rows:\n      - {layers: all, clip: 1.0, noise: $noise}",
            "rows:\n      - {layers: 'block[7]', clip: 1.0}\n    epsilon: 8",
            8,
            "it has blocks 0 to 2",
        ),
        ("clip: 1.0, ", "", 9, "without a clip"),
        ("noise: $noise}", "noise: $noise, keep: 1.5}", 9, "above 0 and at most 1"),
        ("clip: 1.0", "clip: no", 9, "'no' is read as False by YAML"),
        ("{noise: [0.5]}", "{noise: [0.5], other: [1, 2]}", 7, "used by no row"),
        ("delta: 1.0e-3", "delta: 0.5", 12, "expected at most 1/54"),
        ("texts.jsonl", "txts.jsonl", 4, "did you mean 'texts.jsonl'?"),
        ("/model\n", "/nowhere\n", 2, "no model folder"),
        ("panel-1", "panel-9", 10, "did you mean 'panel-1'?"),
        ("attacks: [rows]", "attacks: [row]", 10, "did you mean 'rows'?"),
        ("attacks: [rows]", "attacks: ['likelihood:quik']", 10, "has no preset 'quik'; did you mean 'quick'?"),
        ("targets: 2", "targets: 5000", 10, "are more than the 54 training texts"),
        ("privacy:", "recommend: {min_utility: 80}\nprivacy:", 12, "expected a number from -1 to 1"),
        ("  path:", "  label: lable\n  path:", 0, "no column 'lable'; did you mean 'label'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_study(home, told, tmp_path, old, new, line, said):
    path = study(home, tmp_path, (old, new))
    place = f"study.yaml:{line}:" if line else "texts.jsonl:1"
    one_sentence(told("run", path, "--out", tmp_path / "out"), place, said)
    assert not (tmp_path / "out" / "records.sqlite").exists(), "nothing was begun"


def test_a_word_that_is_no_command_has_its_nearest_named_once(told):
    status, _out, err = told("runn")
    assert (status, err.count("Did you mean 'run'?")) == (2, 1)
    one_sentence(told("check", "study.yaml"), "No such command 'check'. Did you mean 'dpguard run STUDY --dry-run'?")


def test_a_study_is_no_policy_and_a_dry_run_checks_what_a_run_does(home, told, tmp_path):
    path = study(home, tmp_path)
    asked = ("--sampling-rate", "0.1", "--steps", "10", "--delta", "1e-5")
    one_sentence(told("guarantee", path, *asked), "study.yaml:", "this is a study, with several policies")
    for workers in ("0", "-1"):
        told_so = f"workers is {workers}, expected a whole number above 0"
        one_sentence(told("run", path, "--dry-run", "--workers", workers), told_so)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "empty"), ("- a\n- b\n", "list"), ("just words", "expected"), ("a: [1,\nb: }", "YAML")],
)
def test_a_file_that_is_no_study(told, tmp_path, text, said):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    one_sentence(told("run", path), "study.yaml", said)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        ([{"text": "a", "label": "good"}] * 9, "texts.jsonl:1: label is 'good'; expected a class index"),
        ([{"text": "help " * (60 + i), "label": 1} for i in range(9)], "does not fit the model's 48 positions"),
        ([{"text": "", "label": 1}] * 9, "expected a text"),
    ],
)
def test_a_mistake_in_the_data(home, told, tmp_path, rows, said):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = study(home, tmp_path, (str(home / "texts.jsonl"), str(tmp_path / "texts.jsonl")))
    one_sentence(told("run", path, "--out", tmp_path / "out"), said)


def test_a_mistake_in_the_model(home, told, tmp_path):
    (tmp_path / "empty").mkdir()
    one_sentence(told("layers", tmp_path / "empty"), "is no model", "config.json")
    one_sentence(told("layers", "some/hub-model"), "no model hub can be reached")
    odd = tiny.module("bert")
    odd.config.model_type = "bert"
    config = json.loads((home / "model" / "config.json").read_text())
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "model_type": "no-such-kind"}))
    (tmp_path / "t5" / "tokenizer.json").write_text((home / "model" / "tokenizer.json").read_text())
    one_sentence(told("layers", tmp_path / "t5"), "t5")


def test_mistakes_on_the_command_line(home, told, tmp_path):
    one_sentence(told("rnu"), "No such command 'rnu'")
    one_sentence(told("run", tmp_path / "nothing.yaml"), "no such file")
    one_sentence(told("list", "policy"), "did you mean 'policies'?")
    one_sentence(told("report", tmp_path), str(tmp_path))
    one_sentence(told("recommend", tmp_path, "--max-leakage", "2"), "max-leakage")
    common = ("--model", home / "model", "--sampling-rate", "0.1", "--steps", "10")
    one_sentence(told("guarantee", "dp-sdg", *common), "did you mean 'dp-sgd'?")
    one_sentence(told("guarantee", "dp-sgd", *common, "--delta", "0.1", "--examples", "100"), "larger than 1 / 100")
    one_sentence(told("guarantee", "block[9]", *common), "it has blocks 0 to 2")
    where = ("--model", home / "model", "--data", home / "texts.jsonl")
    one_sentence(told("attack", *where, "--attack", "spam"), "did you mean 'span'?")
    one_sentence(told("attack", *where, "--text", "txt"), "did you mean 'text'? (name it with --text text)")
    one_sentence(told("attack", *where, "--targets", "999"), "expected at most")
    one_sentence(told("attack", *where, "--know", "label"), "did you mean 'labels'?")
    one_sentence(told("attack", *where, "--know", "none"), "expected one of: count, labels, lengths, nothing")
    one_sentence(told("attack", *where, "--know", ""), "expected one of: count, labels, lengths, nothing")
    one_sentence(told("attack", *where, "--know", "nothing", "--know", "labels"), "expected it alone")
    one_sentence(told("attack", *where, "--candidates", "1"), "expected 2 or more")
    one_sentence(told("attack", *where, "--candidates", "9", "--clients", "2"), "--clients 1")
    one_sentence(told("attack", *where, "--candidates", "999"), "expected at most")
    one_sentence(told("attack", *where, "--mode", "evl"), "did you mean 'eval'?")
    one_sentence(told("attack", *where, "--clients", "0"), "clients")


def records(folder):
    with Store.open(folder) as store:
        return store.records()


def test_another_studys_folder_is_left_alone(home, told, tmp_path):
    out = tmp_path / "out"
    first = study(home, tmp_path, ("utility: {epochs: 1, batch_size: 8}\n", ""))
    assert told("run", first, "--out", out, "--workers", "1")[0] == 0
    before = records(out)
    other = study(home, tmp_path, ("name: mine", "name: yours"))
    one_sentence(told("run", other, "--out", out), "'mine'", "'yours'")
    assert records(out) == before


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
@pytest.mark.parametrize("command", [("attack",), ("fit-clips", "dp-sgd"), ("audit", "dp-sgd")])
def test_a_seed_that_no_generator_takes_is_refused_at_once(told, command, seed):
    status, out, err = told(*command, "--seed", seed)
    assert (status, out) == (2, "")
    assert "--seed" in err
    assert "Traceback" not in err
