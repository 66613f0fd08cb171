"""Models whose own loss is another one than the project's: refused before anything is trained or leaves."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from dpguard.engine.client import Client
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch, collate
from dpguard.policy.table import Policy
from tests import tiny

ALL = [{"layers": "all", "clip": 0.1, "noise": 1.0}]
TEXTS = [("bad film", 0), ("a dinner", 1), ("no money", 0), ("a good trip", 1)]


def encoded(items):
    batch = collate([text for text, _ in items], [label for _, label in items], tiny.tokenizer())
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def private(model, grad_mode="fast"):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TEXTS, batch_size=4, collate_fn=encoded)
    made = PrivacyEngine().make_private(
        module=model.train(), optimizer=inner, data_loader=loader, policy=Policy(ALL), grad_mode=grad_mode
    )
    return made[0]


def other(kind: str):
    made = tiny.module("bert")
    return getattr(transformers, kind)(made.config)


TASKS = {
    "masked tokens": (lambda: other("BertForMaskedLM"), "predicts masked tokens"),
    "several labels": (lambda: tiny.module("bert", problem_type="multi_label_classification"), "one class a text"),
    "a number": (lambda: tiny.module("bert", labels=1), "at least two classes"),
}


@pytest.mark.parametrize("grad_mode", ["fast", "loop", "opacus"])
@pytest.mark.parametrize("task", TASKS)
def test_another_task_is_refused_before_training(task: str, grad_mode: str) -> None:
    make, words = TASKS[task]
    with pytest.raises(UserError, match=words):
        private(make(), grad_mode)


@pytest.mark.parametrize("task", TASKS)
def test_another_task_is_refused_before_a_message_leaves(task: str) -> None:
    make, words = TASKS[task]
    with pytest.raises(UserError, match=words):
        Client(make(), Policy(ALL), seed=0)


def test_a_class_for_every_token_is_refused() -> None:
    batch = encoded(TEXTS)
    labels = torch.zeros_like(batch["input_ids"])
    with pytest.raises(UserError, match="BertForTokenClassification has a class for every token"):
        private(other("BertForTokenClassification"))(**{**batch, "labels": labels})
    client = Client(other("BertForTokenClassification"), Policy(ALL), seed=0)
    with pytest.raises(UserError, match="a class for every token"):
        client.observe(Batch(batch["input_ids"], batch["attention_mask"], labels))


def test_labels_that_are_no_classes_are_refused() -> None:
    batch = encoded(TEXTS)
    with pytest.raises(UserError, match="expected one class index a text"):
        private(tiny.module("bert"))(**{**batch, "labels": torch.eye(2).repeat(2, 1)})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_loss_is_the_model_s_own(family: str) -> None:
    model = tiny.module(family)
    batch = encoded(TEXTS)
    own = model(**batch).loss
    torch.testing.assert_close(private(model).eval()(**batch).loss, own)
