"""The class that the head gives away: right where it is named, and not named where the message cannot say."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks import guesses, panel
from dpguard.attacks.labels import given_away, labels_of
from tests import messages, tiny

TEXT = "the nurse called about her test result"


def _seen(family="bert", label=1, labels=2, rows=(), tell=(), text=TEXT):
    return messages.observe(tiny.loaded(family, labels=labels), list(rows), [text], [label], tell=tell)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama"])
@pytest.mark.parametrize("label", [0, 3, 11])
def test_the_head_names_the_class_among_twelve(family: str, label: int) -> None:
    seen, _ = _seen(family, label, labels=12)
    assert given_away(seen, 12) == label
    assert labels_of(seen) == [label]


@pytest.mark.parametrize("label", [0, 1])
def test_of_two_classes_the_bias_names_one_and_the_weight_none(label: int) -> None:
    assert given_away(_seen("bert", label)[0], 2) == label
    without = [{"layers": "all", "share": False}, {"layers": "name:classifier.weight", "share": True}]
    assert labels_of(_seen("bert", label, rows=without)[0]) == [0, 1]


@pytest.mark.parametrize(
    "rows",
    [
        [{"layers": "head", "share": False}],
        [{"layers": "all", "clip": 0.1, "noise": 1.0}],
        [{"layers": "all", "bits": 4}],
        [{"layers": "all", "keep": 0.5, "prune": "random"}],
    ],
    ids=["withheld", "noise", "rounded", "pruned"],
)
def test_a_head_that_does_not_come_whole_names_nothing(rows) -> None:
    assert labels_of(_seen("bert", 1, rows=rows)[0]) == [0, 1]


def test_a_clip_changes_no_sign_and_a_told_label_comes_first() -> None:
    assert labels_of(_seen("bert", 1, rows=[{"layers": "all", "clip": 1e-3}])[0]) == [1]
    assert labels_of(_seen("bert", 1, tell=("labels",))[0]) == [1]


def test_two_texts_have_no_one_class() -> None:
    seen, _ = messages.observe(tiny.loaded("bert", labels=5), [], [TEXT, "yes"], [1, 1], tell=())
    assert given_away(seen, 5) is None
    assert len(guesses.label_guesses(seen, 2, torch.Generator())) == 15


@pytest.mark.parametrize("shared", ["whole", "head withheld"])
def test_matching_reaches_the_last_of_many_classes(shared: str) -> None:
    rows = [{"layers": "head", "share": False}] if shared == "head withheld" else []
    seen, batch = _seen("bert", 69, labels=70, rows=[*rows, {"layers": "embeddings", "share": False}], text="yes")
    found = panel.run_panel(seen, ("match",), 0)[-1].reconstruction
    assert (found.sequences, found.certain) == ([batch.input_ids[0].tolist()], [True])


def test_the_order_of_words_is_tried_under_every_class() -> None:
    rows = [{"layers": "all", "share": False}, {"layers": "block[0].attention.value.weight", "share": True}]
    seen, batch = _seen("llama", 11, labels=12, rows=rows, text="please call her about the card")
    found = panel.run_panel(seen, ("span",), 0)[-1].reconstruction
    assert (found.sequences, found.certain) == ([batch.input_ids[0].tolist()], [True])
