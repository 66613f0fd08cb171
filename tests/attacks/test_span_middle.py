"""Batches from one block at any depth: rows, whose they are, texts; exact and proven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span
from dpguard.attacks.span_block import later_block
from dpguard.attacks.span_evidence import gather, usable
from dpguard.attacks.span_middle import RowFinder, Rows, texts_of
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from tests import messages, tiny

TEXTS = (*tiny.SENTENCES[:2], "please call her", "the card is lost and found")
REAL = ("the nurse called her", "we saw no new result today")
PARTS = ("attention.value", "attention.output", "mlp.in", "mlp.out")


def _seen(model, *parts: str, block: int = 1, texts=TEXTS):
    rows = [{"layers": "all", "share": False}, {"layers": [f"block[{block}].{p}.weight" for p in parts], "share": True}]
    labels = [i % 2 for i in range(len(texts))]
    seen, batch = messages.observe(model, rows, texts, labels, tell=())
    seen = replace(seen, disclosed=replace(seen.disclosed, sequences=None))
    lengths = batch.attention_mask.sum(1).tolist()
    return seen, [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]


def _tiny(*parts: str, texts=TEXTS):
    return _seen(tiny.loaded("bert", width=96), *parts, texts=texts)[0]


def _run(seen, **options):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0), **options)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["attention.value", "attention.query"])
def test_every_text_is_found_and_proven_from_one_inner_block(minilm, reader: str) -> None:
    seen, true = _seen(minilm, reader, *PARTS[1:], block=3, texts=REAL)
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)
    assert found.notes["complete"]
    assert found.notes["rows"] == found.notes["rank"] == sum(map(len, true))


def test_rows_and_their_parts_are_the_clients_own_and_each_finds_its_text(minilm) -> None:
    seen, true = _seen(minilm, *PARTS, block=2, texts=REAL)
    with left_as_found(seen.model):
        probe, sites = Probe(seen.model), sites_of(seen.model)
        block = later_block(probe, sites, 2)
        assert block is not None
        spans = {e.site.role: e.span for e in gather(seen, usable(seen, sites)[0], causal=False, most=4)}
        finder = RowFinder(block, spans | {"inputs": spans["value"]}, torch.Generator().manual_seed(0))
        rows = finder.find(40, 2000)
        inner, value = sites.find(2, "mlp_in"), sites.find(2, "value")
        assert inner is not None
        assert value is not None
        states, inputs = (
            torch.cat([probe.states(s.layer, torch.tensor([ids]))[0].double() for ids in true]) for s in (inner, value)
        )
    near = torch.cdist(rows.states, states).argmin(1)
    assert sorted(near.tolist()) == list(range(len(states)))
    assert torch.allclose(rows.states, states[near], atol=1e-2)
    assert torch.allclose(rows.inputs, inputs[near], atol=1e-2)
    owner = torch.cat([torch.full((len(ids),), i) for i, ids in enumerate(true)])[near]
    groups = texts_of(block, Rows(rows.states, rows.inputs, rows.mixtures))
    assert sorted(map(len, groups)) == sorted(map(len, true))
    assert all(len(set(owner[group].tolist())) == 1 for group in groups)


def test_no_step_no_text() -> None:
    seen = _tiny(*PARTS)
    found = _run(seen, budget=replace(span.PLUGIN.presets["quick"], steps=0))
    assert found.sequences == []


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_a_message_that_says_nothing_proves_nothing(spoil) -> None:
    for seed in range(3):
        found = _run(spoil(_tiny(*PARTS), seed=seed))
        assert not any(found.certain)
        assert found.notes["reason"]


def test_two_messages_mixed_prove_nothing() -> None:
    """The MLP's output weight of one batch, the others of another one."""
    one, other = _tiny(*PARTS), _tiny(*PARTS, texts=("no pain in arm", "please help her today"))
    name = next(n for n in one.message if n.endswith("output.dense.weight") and "attention" not in n)
    quick = span.PLUGIN.presets["quick"]
    assert not any(_run(replace(one, message={**one.message, name: other.message[name]}), budget=quick).certain)


def test_a_block_that_is_not_whole_is_refused_with_both_reasons() -> None:
    reason = span.PLUGIN.applicable(_tiny(*PARTS[1:]))
    assert "first block" in reason
    assert "value or query" in reason
