from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer

from dpguard.inputs.demo import bundle, corpus, make, words
from dpguard.inputs.models import load

SPLITS = ("train", "test", "public")


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bundle.paths()[split].read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundle.folder())


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_well_formed(split, rows):
    for row in rows[split]:
        assert set(row) == {"text", "label", "entities"}
        assert row["label"] in (0, 1)
        assert row["text"] == row["text"].lower().strip()
        assert corpus.WORDS_MIN <= len(row["text"].split()) <= corpus.WORDS_MAX
        assert not re.search(r"[{}]", row["text"])
        assert all(entity and entity in row["text"] for entity in row["entities"])
        assert len(set(row["entities"])) == len(row["entities"])


def test_sizes_are_as_described_and_small(rows):
    assert {split: len(rows[split]) for split in SPLITS} == bundle.about()["rows"] == make.SIZES
    files = [*bundle.paths().values(), *bundle.folder().iterdir()]
    assert sum(file.stat().st_size for file in files) < 2.5 * 2**20


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_and_most_rows_hold_an_entity(split, rows):
    assert 0.45 < np.mean([row["label"] for row in rows[split]]) < 0.55
    assert np.mean([bool(row["entities"]) for row in rows[split]]) > 0.95


def test_no_text_occurs_twice(rows):
    for split in SPLITS:
        texts = [row["text"] for row in rows[split]]
        assert len(set(texts)) == len(texts)
    for one, other in combinations(SPLITS, 2):
        assert not {row["text"] for row in rows[one]} & {row["text"] for row in rows[other]}


def test_public_names_and_numbers_are_nobody_elses(rows):
    shared = {entity for row in rows["public"] for entity in row["entities"]} & {
        entity for split in ("train", "test") for row in rows[split] for entity in row["entities"]
    }
    general = {*words.DIAGNOSES, *(f"ward {number}" for number in range(1, 20))}
    assert all(entity in general or re.fullmatch(r"\d+ [a-z]+", entity) for entity in shared)
    telephones = {word for row in rows["public"] for word in re.findall(r"07700 900\d{3}", row["text"])}
    assert telephones
    assert all(int(number[-3:]) < 500 for number in telephones)
    pools = [
        {name for lists in (words.WOMEN, words.MEN, words.SURNAMES, words.DOCTORS) for name in lists[pool]}
        for pool in ("public", "private")
    ]
    assert not pools[0] & pools[1]


def test_the_corpus_and_the_vocabulary_are_those_that_the_script_makes(rows, tokenizer):
    public = make.public_notes()
    assert [(note.text, note.label, list(note.entities)) for note in public] == [
        (row["text"], row["label"], row["entities"]) for row in rows["public"]
    ]
    made = make.learn_vocabulary([note.text for note in public])
    assert made.get_vocab() == tokenizer.get_vocab()
    train, test = make.private_notes(made)
    assert [note.text for note in train] == [row["text"] for row in rows["train"]]
    assert [note.text for note in test] == [row["text"] for row in rows["test"]]


@pytest.mark.parametrize("split", SPLITS)
def test_every_token_is_known_and_a_note_is_shorter_than_the_width(split, rows, tokenizer):
    config = AutoConfig.from_pretrained(bundle.folder())
    encoded = tokenizer([row["text"] for row in rows[split]]).input_ids
    assert max(map(len, encoded)) < config.hidden_size / 2
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


def test_texts_come_back_from_their_tokens(rows, tokenizer):
    for row in rows["test"][:50]:
        back = tokenizer.decode(tokenizer(row["text"]).input_ids, skip_special_tokens=True)
        assert re.sub(r"\s", "", back) == re.sub(r"\s", "", row["text"])


def test_the_demo_says_that_it_is_synthetic():
    assert bundle.about()["synthetic"] is True
    assert "ynthetic" in bundle.SYNTHETIC


def test_a_label_follows_from_both_clauses_and_not_from_one():
    rng = np.random.default_rng(0)
    states = {wording for goes_on, _ in corpus.STATES.values() for wording in goes_on}
    settled = {wording for _, done in corpus.STATES.values() for wording in done}
    assert not states & settled
    assert all(len(goes_on) == len(done) for goes_on, done in [*corpus.STATES.values(), corpus.DESK])
    drawn = [corpus.write(rng, "private", label) for label in (0, 1) for _ in range(200)]
    assert {note.label for note in drawn} == {0, 1}

    def share(fragment: str, label: int) -> float:
        return float(np.mean([fragment in note.text for note in drawn if note.label == label]))

    assert share(" not ", 0) > 0.3
    assert share(" not ", 1) > 0.3


def test_a_bag_of_words_does_not_get_there(rows, tokenizer):
    """Ridge regression on word counts: what a reader without word order reaches."""

    def bag(split: str) -> tuple[np.ndarray, np.ndarray]:
        counts = np.zeros((len(rows[split]), len(tokenizer)))
        for row, ids in enumerate(tokenizer([row["text"] for row in rows[split]]).input_ids):
            np.add.at(counts[row], ids, 1)
        return counts, np.array([row["label"] for row in rows[split]])

    (seen, wanted), (new, truth) = bag("train"), bag("test")
    weights = np.linalg.solve(seen.T @ seen + 10 * np.eye(seen.shape[1]), seen.T @ (2 * wanted - 1))
    assert np.mean((new @ weights > 0) == truth) < 0.85


def test_hiding_leaves_special_tokens_and_asks_only_for_what_was_chosen():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(make.SPECIAL), 100, (64, 20), generator=generator)
    ids[:, 0], ids[:, -1] = make.CLS, make.PAD
    shown, wanted = make.hide(ids, generator, 100)
    asked = wanted != -100
    assert torch.equal(wanted[asked], ids[asked])
    assert torch.equal(shown[~asked], ids[~asked])
    assert not asked[:, [0, -1]].any()
    assert asked.float().mean().item() == pytest.approx(make.MASKED * 18 / 20, abs=0.03)
    assert (shown[asked] == make.MASK).float().mean().item() == pytest.approx(0.8, abs=0.08)


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    encoded = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask, torch.tensor([row["label"] for row in rows])


def test_the_model_learns_the_task(rows):
    """Non-private fine-tuning reads the notes well: the ceiling of every study of the demo."""
    loaded = load("demo", seed=0)
    model, generator = loaded.module, torch.Generator().manual_seed(0)
    ids, mask, labels = encode(loaded.tokenizer, rows["train"])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    model.train()
    for _ in range(6):
        for batch in torch.randperm(len(ids), generator=generator).split(64):
            logits = model(input_ids=ids[batch], attention_mask=mask[batch]).logits
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(logits, labels[batch]))
            optimizer.step()
    model.eval()
    ids, mask, labels = encode(loaded.tokenizer, rows["test"])
    with torch.no_grad():
        right = model(input_ids=ids, attention_mask=mask).logits.argmax(1) == labels
    assert right.float().mean().item() >= 0.85


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_query_gradient_shows_as_many_directions_as_the_note_has_tokens(block, rows):
    """In exact arithmetic the row space of dL/dW of a linear layer is the span of its inputs; float32 keeps it."""
    loaded = load("demo", seed=0)
    weight = dict(loaded.module.named_parameters())[f"bert.encoder.layer.{block}.attention.self.query.weight"]
    for row in rows["train"][:8]:
        ids, mask, label = encode(loaded.tokenizer, [row])
        places = torch.arange(ids.shape[1])[None]
        logits = loaded.module(input_ids=ids, attention_mask=mask, position_ids=places).logits
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, label), weight)
        strengths = torch.linalg.svdvals(gradient.double())
        kept = ids.shape[1]
        assert strengths[kept - 1] > 10 * strengths[kept]
