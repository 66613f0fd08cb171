"""Where the bundled demo lies: a corpus of synthetic notes and a tiny BERT pretrained on its public part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent

SYNTHETIC = "Synthetic texts: written by a grammar (dpguard.inputs.demo.corpus), about nobody."


def folder() -> Path:
    """The folder of the tiny BERT, in Hugging Face format.

    >>> (folder() / "config.json").is_file()
    True
    """
    return _HERE / "model"


def paths() -> dict[str, Path]:
    """The files of the corpus by split: "train", "test" and "public".

    Each line is an object with ``text``, ``label`` (1: call back today, 0: can wait) and ``entities``, the
    private strings that occur in the text. Public texts share no name or number with the other two splits.

    >>> sorted(paths())
    ['public', 'test', 'train']
    """
    return {split: _HERE / f"{split}.jsonl" for split in ("train", "test", "public")}


def about() -> dict[str, Any]:
    """What `make` wrote down about the demo: that it is synthetic, its seed, its sizes, its model.

    >>> about()["synthetic"]
    True
    """
    described: dict[str, Any] = json.loads((_HERE / "about.json").read_text(encoding="utf-8"))
    return described
