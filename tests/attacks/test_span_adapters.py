"""LoRA's A and B and the MLP's gate read what a layer reads: one text from any, exact and proven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span
from dpguard.attacks.span_evidence import gather
from dpguard.attacks.span_rank import Span
from dpguard.attacks.span_sites import sites_of
from tests import messages, tiny

ONE = tiny.SENTENCES[0]
ADAPTERS = [{"layers": "all", "share": False}, {"layers": "adapters", "share": True}]


def _seen(family: str, rows: list[dict], texts=(ONE,), **lora):
    model = tiny.loaded(family)
    if lora:
        model = replace(model, module=tiny.lora(model.module, lora_dropout=0.0, **lora))
    seen, batch = messages.observe(model, rows, texts, [i % 2 for i in range(len(texts))], tell=())
    return seen, batch.input_ids[0].tolist()


def _run(seen):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_the_adapters_alone_give_a_text_away(family: str) -> None:
    seen, true = _seen(family, ADAPTERS, r=16)
    assert all(".lora_" in name for name in seen.message)
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])
    assert ".lora_A." in found.notes["weight"]


def test_one_a_matrix_of_a_deep_block_is_enough() -> None:
    rows = [{"layers": "all", "share": False}, {"layers": "name:*layer.1*query.lora_A*", "share": True}]
    seen, true = _seen("bert", rows, r=16)
    assert len(seen.message) == 1
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])


def test_matrices_that_read_the_same_vectors_are_read_as_one() -> None:
    """Nine tokens and six rows an A: neither the query's nor the value's shows enough, both together do."""
    seen, true = _seen("bert", ADAPTERS, r=6)
    assert len(true) == 9
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])
    assert found.notes["rank"] == 9


def test_more_tokens_than_rows_are_refused_in_words() -> None:
    seen, _ = _seen("bert", ADAPTERS, r=4)
    found = _run(seen)
    assert found.sequences == []
    assert "LoRA" in found.notes["reason"]
    several, _ = _seen("bert", ADAPTERS, tiny.SENTENCES[:2], r=16)
    assert "LoRA" in span.PLUGIN.applicable(several)


FIRST = {"r": 16, "init_lora_weights": True}
"""LoRA before its first step: B is zero, and A has no gradient."""


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_the_very_first_message_of_lora_gives_a_text_away(family: str) -> None:
    seen, true = _seen(family, ADAPTERS, **FIRST)
    assert not any(seen.message[name].any() for name in seen.message if ".lora_A." in name)
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])
    assert ".lora_B." in found.notes["weight"]


@pytest.mark.parametrize("layer", ["query", "key", "value", "intermediate.dense", "output.dense"])
@pytest.mark.parametrize("block", [0, 1])
def test_one_b_matrix_is_enough(block: int, layer: str) -> None:
    rows = [{"layers": "all", "share": False}, {"layers": f"name:*layer.{block}.*lora_B*", "share": True}]
    seen, true = _seen("bert", rows, target_modules=rf".*layer\.{block}\.(attention\.self\.)?{layer}", **FIRST)
    assert len(seen.message) == 1
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])


def test_another_text_is_never_certain_from_b() -> None:
    seen, _ = _seen("bert", ADAPTERS, **FIRST)
    source = torch.Generator().manual_seed(0)
    turned = {
        name: value @ torch.linalg.qr(torch.randn(value.shape[1], value.shape[1], generator=source)).Q
        for name, value in seen.message.items()
    }
    found = _run(replace(seen, message=turned))
    assert found.sequences  # the rank is the text's still, so that a text is looked for
    assert not any(found.certain)


def test_a_word_that_fits_by_chance_in_few_dimensions_proves_nothing() -> None:
    """Twelve tokens leave four of B's 16 directions; with an error of 1e-3 some of 300,000 words lie in the rest."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q[:12]
    values = torch.ones(12, dtype=torch.float64)
    exact, noised = (Span(basis, values, tail, 16) for tail in (1e-14, 3e-6))
    wide = Span(torch.nn.functional.pad(basis, (0, 368)), values, 3e-6, 384)
    assert exact.holds(basis)
    assert noised.outside(basis)[1].max() < 1e-3
    assert not noised.holds(basis)
    assert wide.holds(wide.basis)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("selector", ["block[0].adapters", "name:*layers.0.*lora_B*"])
def test_whoever_sees_a_too_reads_no_less(family: str, selector: str) -> None:
    rows = [{"layers": "all", "share": False}, {"layers": selector, "share": True}]
    seen, true = _seen(family, rows, **{**FIRST, "r": 32})
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])


def test_a_layer_is_never_taken_for_its_adapter() -> None:
    model = tiny.lora(tiny.module("bert"), r=16)
    sites = sites_of(model)
    value = sites.find(0, "value")
    assert value is not None
    assert not value.adapter
    for side in "AB":
        found = {(s.role, s.block) for s in sites.all if s.adapter == side}
        assert found == {(r, b) for r in ("query", "value") for b in range(3)}
    adapters = [s for s in sites.all if s.adapter == "A"]
    assert adapters[0].beside(value)
    assert not adapters[0].beside(next(s for s in adapters if s.block == 1))
    b = next(s for s in sites.all if s.adapter == "B")
    assert not b.beside(value)
    assert not b.beside(adapters[0])


@pytest.mark.parametrize("block", [0, 1])
def test_the_gate_of_an_mlp_reads_what_its_other_half_reads(block: int) -> None:
    rows = [{"layers": "all", "share": False}, {"layers": f"block[{block}].mlp.gate", "share": True}]
    seen, true = _seen("llama", rows)
    assert span.PLUGIN.applicable(seen) == ""
    assert _run(seen).sequences == [true]
    (gate,) = gather(seen, [s for s in sites_of(seen.model).all if s.name in seen.message], causal=True, most=1)
    assert gate.span.rank == len(true)
