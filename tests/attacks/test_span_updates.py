"""Changes of weights after local steps, and averages over clients: the texts are read, and nothing wrong is proven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine.client import Client
from dpguard.engine.local import LocalTraining
from dpguard.engine.update import aggregate
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import messages, tiny

WITHHELD = [{"layers": "embeddings", "share": False}]
TEXTS = (*tiny.SENTENCES[:2], "please call her", "the card is lost and found")
RATE = 1e-3


def _seen(texts=TEXTS, *, steps: int = 4, clients: int = 1, family: str = "bert", rows=WITHHELD, **told):
    """The update of every client after its local steps, averaged; and the true token ids."""
    model = tiny.loaded(family, width=96)
    plan = Policy(list(rows)).plan(slots(model.module))
    share = len(texts) // clients
    updates, true = [], []
    for number in range(clients):
        part = list(texts[number * share : (number + 1) * share])
        batch = collate(part, [i % 2 for i in range(len(part))], model.tokenizer)
        training = LocalTraining(learning_rate=RATE)
        client = Client(model.module, plan, seed=number, batch_size=share, training=training)
        updates.append(client.observe([batch] * steps if steps else batch))
        lengths = batch.attention_mask.sum(1).tolist()
        true += [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
    update = aggregate(updates)
    known = Disclosed(
        model.tokenizer, plan, update.batch_size, sequences=None, kind=update.kind, local_steps=update.local_steps,
        learning_rate=RATE if steps else None, clients=update.clients,
    )  # fmt: skip
    return Observation(update.tensors, model.module, replace(known, **told)), true


def _run(seen: Observation, seed: int = 0, **options):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_texts_behind_four_local_steps_are_read_and_none_is_proven(family: str) -> None:
    seen, true = _seen(family=family)
    assert seen.disclosed.kind == "delta"
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert all(ids in found.sequences for ids in true)
    assert not any(found.certain)


def test_one_text_behind_local_steps_is_read_though_the_rank_is_no_length() -> None:
    seen, true = _seen(TEXTS[:1], sequences=1)
    assert _run(seen).sequences[0] == true[0]


def test_one_text_behind_local_steps_from_one_deep_weight() -> None:
    rows = [{"layers": "all", "share": False}, {"layers": "block[1].attention.query.weight", "share": True}]
    seen, true = _seen(TEXTS[:1], rows=rows, sequences=1)
    found = _run(seen)
    assert found.sequences == true
    assert found.certain == [False]


@pytest.mark.parametrize("steps", [0, 4])
def test_an_average_over_clients_is_a_batch_of_all_their_texts(steps: int) -> None:
    seen, true = _seen(clients=2, steps=steps)
    assert seen.disclosed.clients == 2
    found = _run(seen)
    assert all(ids in found.sequences for ids in true)
    assert found.certain == ([True] * len(true) if not steps else [False] * len(found.certain))


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_an_update_that_says_nothing_gives_nothing(spoil) -> None:
    for seed in range(3):
        found = _run(spoil(_seen()[0], seed=seed), seed=seed)
        assert not any(found.certain)


def test_a_message_of_another_kind_is_refused() -> None:
    seen = _seen()[0]
    assert "'gossip'" in span.PLUGIN.applicable(replace(seen, disclosed=replace(seen.disclosed, kind="gossip")))
