"""What is counted is what an encoding really takes, and it loses nothing."""

from __future__ import annotations

import pytest
import torch

from dpguard.engine.client import Client
from dpguard.federation.bytes import decode, encode, message_bytes
from dpguard.inputs.batch import collate
from tests import tiny
from tests.federation import small

ROWS = {
    "open": [{"layers": "all", "train": True}],
    "partial": [{"layers": "embeddings", "share": False}],
    "pruned": [{"layers": "all", "clip": 1.0, "noise": 0.1, "keep": 0.3}],
    "pruned to few": [{"layers": "all", "clip": 1.0, "noise": 0.1, "keep": 0.003}],
    "random": [{"layers": "all", "clip": 1.0, "noise": 0.1, "keep": 0.1, "prune": "random"}],
    "random, quantised": [{"layers": "all", "clip": 1.0, "noise": 0.1, "keep": 0.1, "prune": "random", "bits": 4}],
    "signs": [{"layers": "all", "clip": 1.0, "noise": 0.1, "bits": 1}],
    "signs with zeros": [{"layers": "all", "clip": 1.0, "bits": 1}],
    "signs of few": [{"layers": "all", "clip": 1.0, "noise": 0.1, "bits": 1, "keep": 0.05}],
    "two bits": [{"layers": "all", "clip": 1.0, "noise": 0.1, "bits": 2}],
    "eight bits": [{"layers": "all", "clip": 1.0, "noise": 0.1, "bits": 8}],
    "sixteen bits": [{"layers": "all", "clip": 1.0, "bits": 16}],
    "pruned, quantised": [{"layers": "all", "clip": 1.0, "noise": 0.1, "bits": 8, "keep": 0.2}],
    "by layer": [{"layers": "embeddings", "keep": 0.01}, {"layers": "head", "bits": 3}],
}  # fmt: skip


def message(rows, seed=0):
    made = small.model()
    client = Client(made, small.plan(rows, made), seed=seed, mask_seed=7)
    texts = small.texts(3, seed=seed)
    batch = collate([e.text for e in texts], [e.label for e in texts], tiny.tokenizer())
    return client, client.observe(batch).tensors


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_encoding_of_that_size_gives_the_message_back(name, seed):
    client, tensors = message(ROWS[name], seed)
    sent = encode(tensors, client.plan, mask_seed=7)
    assert len(sent) == message_bytes(tensors, client.plan)
    for tensor, value in decode(sent, client.plan, mask_seed=7).items():
        assert torch.equal(value, tensors[tensor]), tensor


def test_what_a_smaller_message_costs():
    size = {
        name: message_bytes(tensors, client.plan) for name, rows in ROWS.items() for client, tensors in [message(rows)]
    }
    entries = sum(p.numel() for p in small.model().parameters())
    tensors = len(list(small.model().parameters()))
    assert size["open"] == 4 * entries
    assert size["partial"] < size["open"]
    assert size["eight bits"] == pytest.approx(entries + 4 * tensors, abs=tensors)
    assert size["sixteen bits"] == 2 * entries + 4 * tensors
    assert size["signs"] <= entries / 8 + 6 * tensors
    assert size["random"] < 0.105 * size["open"] + 8 * tensors
    # a bitmap costs an eighth of a byte an entry, a list of few indices less than that
    assert size["pruned"] < (4 * 0.3 + 1 / 8) * entries + 8 * tensors
    assert size["pruned to few"] < 0.003 * 6 * entries + 16 * tensors
    assert size["pruned to few"] < size["pruned"]
    assert size["signs with zeros"] < size["two bits"]


def test_a_message_cut_short_is_noticed():
    client, tensors = message(ROWS["open"])
    sent = encode(tensors, client.plan)
    with pytest.raises(ValueError, match=r"bytes|buffer"):
        decode(sent + b"!", client.plan)
    with pytest.raises(ValueError, match=r"bytes|buffer"):
        decode(sent[:-1], client.plan)
