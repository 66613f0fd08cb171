"""Files that are not what their names say: each is one sentence, never a traceback and never a random model."""

from __future__ import annotations

import json
import pickle

import pyarrow
import pytest
import torch
import transformers
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from dpguard.errors import UserError
from dpguard.inputs import models, texts
from dpguard.inputs.tables import NoColumnError
from tests import tiny

GOOD = {"text": "the ward", "label": 1}
TEXTS = {
    "unclosed quote": (".csv", b'text,label\n"the ward,1\n' + b"x" * 140_000, "is no CSV"),
    "half a character": (".jsonl", b'{"text": "late \\ud83d", "label": 0}\n', "text holds half a character"),
    "a number without end": (".jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", "is no JSON"),
    "brackets without end": (".jsonl", b"[" * 100_000 + b"\n", "is no JSON"),
    "no parquet": (".parquet", b"PAR1 something PAR1", "is no parquet file that can be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_file_of_texts(tmp_path, name):
    kind, content, sentence = TEXTS[name]
    path = tmp_path / f"own{kind}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"own\{kind}.*{sentence}"):
        texts.load(str(path))


def test_a_parquet_file_with_damaged_pages(tmp_path):
    path = tmp_path / "own.parquet"
    parquet.write_table(pyarrow.table({"text": ["the ward " * 50] * 200, "label": [1] * 200}), path)
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.parquet"):
        texts.load(str(path))


def test_a_name_longer_than_a_file_system_takes_is_no_file():
    with pytest.raises(UserError, match="no data file"):
        texts.load("x" * 3000 + ".jsonl")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    tiny.module("bert", width=16, blocks=2).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("prefix", ["module.", "x"])
def test_weights_under_other_names_are_no_model(folder, prefix):
    file = folder / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights that fit '.*' \(\d+ of \d+ tensors\); expected a checkpoint"):
        models.load(str(folder))


def test_a_vocabulary_of_another_size_is_no_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 7}))
    with pytest.raises(UserError, match="has no weights that fit"):
        models.load(str(folder))


def test_a_fresh_head_is_the_normal_case(folder):
    tiny.headless(folder)
    assert models.load(str(folder), labels=5).classes == 5


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("labels", [2, 3, 10])
def test_a_checkpoints_own_head_is_never_drawn_again(tmp_path, family, labels):
    """One stray label 9 put ten random classes in place of a trained head of three."""
    trained = tiny.module(family, width=16, blocks=2, labels=3)
    trained.save_pretrained(tmp_path)
    tiny.tokenizer(family in ("gpt2", "llama")).save_pretrained(tmp_path)
    found = models.load(str(tmp_path), labels=labels)
    assert found.classes == 3
    state = found.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())


def test_a_head_that_config_json_does_not_describe_is_no_model(folder):
    config = json.loads((folder / "config.json").read_text())
    named = {"id2label": {k: str(k) for k in range(4)}, "label2id": {str(k): k for k in range(4)}}
    (folder / "config.json").write_text(json.dumps({**config, **named}))
    with pytest.raises(UserError, match=r"has no weights that fit 'classifier\.bias' \(2 of \d+ tensors\)"):
        models.load(str(folder), labels=3)


def test_a_pooler_of_another_size_is_no_model(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["bert.pooler.dense.bias"] = weights["bert.pooler.dense.bias"][:8].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights that fit 'bert\.pooler\.dense\.bias'"):
        models.load(str(folder))


def test_the_head_of_another_task_is_no_head(folder):
    """A tagger's head is called like a text classifier's, and has the classes of tokens."""
    config = transformers.BertConfig.from_pretrained(folder, num_labels=9)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    assert models.load(str(folder), labels=2).classes == 2


def test_a_checkpoint_that_is_a_pointer_or_cut_short(folder):
    (folder / "model.safetensors").write_text("version https://example.invalid/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder))


@pytest.mark.parametrize("name", ["my model", "modèle", "~nosuchuser/m"])
def test_names_that_neither_a_folder_nor_a_hub_has(name):
    with pytest.raises(UserError, match="expected 'demo', 'minilm'"):
        models.load(name)


def test_a_missing_column_crosses_processes() -> None:
    error = NoColumnError("text", ["label", "sentence"], ("text", "label"), "a.csv:1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
