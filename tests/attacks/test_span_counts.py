"""Texts that are in a batch more than once are reported as often."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span
from dpguard.attacks.observation import Observation
from dpguard.attacks.span_counts import counts_of
from tests import messages, tiny

WITHHELD = [{"layers": "embeddings", "share": False}]
TEXTS = (tiny.SENTENCES[0], "please call her", tiny.SENTENCES[0], "please call her", "please call her")


def _seen(texts=TEXTS, labels=(0, 1, 0, 0, 1), rows=WITHHELD, classes: int = 2) -> tuple[Observation, list[list[int]]]:
    model = tiny.loaded("bert", width=96, labels=classes)
    head = next(p for n, p in model.module.named_parameters() if n == "classifier.bias")
    with torch.no_grad():
        head[0] = 0.4  # equal chances leave open whether labels of both kinds cancelled
    seen, batch = messages.observe(model, rows, texts, list(labels), tell=())
    lengths = batch.attention_mask.sum(1).tolist()
    return seen, [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]


def _run(seen: Observation):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("labels", [(0, 1, 0, 0, 1), (1, 1, 0, 1, 1)])
def test_repeated_texts_are_found_as_often_as_they_are_there(told: bool, labels) -> None:
    seen, true = _seen(labels=labels)
    if not told:
        seen = replace(seen, disclosed=replace(seen.disclosed, sequences=None))
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)


def test_texts_that_are_there_once_stay_so() -> None:
    seen, true = _seen(TEXTS[:2], (0, 1))
    seen = replace(seen, disclosed=replace(seen.disclosed, sequences=None))
    assert sorted(_run(seen).sequences) == sorted(true)


def test_counts_with_three_classes() -> None:
    seen, true = _seen(labels=(0, 2, 1, 2, 2), classes=3)
    name = next(n for n in seen.message if n.endswith("layer.0.output.dense.weight"))
    assert counts_of(seen, name, [true[0], true[1]]) == [2, 3]


def test_a_missing_or_a_wrong_text_leaves_part_of_the_message_and_no_counts() -> None:
    seen, true = _seen()
    name = next(n for n in seen.message if n.endswith("layer.0.output.dense.weight"))
    assert counts_of(seen, name, [true[0], true[1]]) == [2, 3]
    assert counts_of(seen, name, [true[0]]) is None
    assert counts_of(seen, name, [true[0], [*true[1][:-2], 20, true[1][-1]]]) is None
    assert counts_of(seen, name, []) is None


def test_clipped_gradients_and_local_steps_are_not_counted() -> None:
    seen, true = _seen(rows=[{"layers": "all", "clip": 1.0}])
    name = next(n for n in seen.message if n.endswith("layer.0.output.dense.weight"))
    assert counts_of(seen, name, [true[0], true[1]]) is None
    seen, true = _seen()
    assert counts_of(replace(seen, disclosed=replace(seen.disclosed, kind="delta")), name, [true[0], true[1]]) is None


def test_the_model_is_left_as_it_was() -> None:
    seen, true = _seen()
    seen.model.requires_grad_(False)
    name = next(n for n in seen.message if n.endswith("layer.0.output.dense.weight"))
    counts_of(seen, name, [true[0], true[1]])
    assert not any(p.requires_grad for p in seen.model.parameters())
