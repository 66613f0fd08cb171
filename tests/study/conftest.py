from __future__ import annotations

from pathlib import Path

import pytest

from dpguard.documents import Document
from dpguard.study.spec import Study

TEXT = """\
name: which-layers
question: Does it help?
model: demo
data: demo
policies:
  dp-sgd: {sweep: {noise: [0.3, 0.6]}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
  last-block:
leakage: {targets: 3, at: [start, end], seeds: [0, 1]}
utility: {epochs: 2, batch_size: 50, seeds: [0, 1, 2]}
"""
MODEL = {"name": "m", "hash": "1"}
DATA = {"name": "d", "hash": "2", "train": 1000, "test": 100}
EXECUTE = f"{Path(__file__).parent / 'fake_cells.py'}:execute"


class Kit:
    """What the tests of this room share."""

    text = TEXT
    model = MODEL
    data = DATA
    execute = EXECUTE

    @staticmethod
    def study(text: str = TEXT, path: str = "study.yaml") -> Study:
        return Study.read(Document.parse(text, path))

    @classmethod
    def cells(cls, text: str = TEXT):
        return cls.study(text).cells(MODEL, DATA)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
