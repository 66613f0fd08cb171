"""A small real model and texts on disk, and a way to run the command line in this process."""

from __future__ import annotations

import json
import sys

import pytest

from dpguard.cli.main import main
from tests import tiny

STUDY = """\
name: mine
model: {model}
data:
  path: {data}
policies:
  dp-sgd:
    sweep: {{noise: [0.5]}}
    rows:
      - {{layers: all, clip: 1.0, noise: $noise}}
leakage: {{panel: panel-1, targets: 2, attacks: [rows]}}
utility: {{epochs: 1, batch_size: 8}}
privacy: {{delta: 1.0e-3}}
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.module("bert").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    words = tiny.WORDS
    rows = [
        {"text": " ".join(words[i % 40 : i % 40 + 3 + i % 4]) + f" {words[i % 50]}", "label": i % 2} for i in range(80)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def told(monkeypatch, capsys, tmp_path):
    """Run a command line; (exit status, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dpguard", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def write_study(home, tmp_path, *changes):
    """The study above with some texts replaced."""
    text = STUDY.format(model=home / "model", data=home / "texts.jsonl")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path
