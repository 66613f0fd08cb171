"""A search's precision follows what the processor can multiply, and proves nothing in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import precision, span
from dpguard.attacks.base import Budget
from dpguard.attacks.precision import search_dtype
from dpguard.attacks.span_evidence import gather, usable
from dpguard.attacks.span_search import SURE, Search
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from tests import messages, tiny

TABLE = torch.zeros(8, 384)
LONG = "please call her about the card and thank you for help with his test result today"


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_where_the_processor_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert search_dtype(TABLE) is torch.bfloat16
    assert search_dtype(TABLE[:, :64]) is torch.float32  # nothing to gain
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: False, "avx2": True})
    assert search_dtype(TABLE) is torch.float32


def test_float32_where_torch_does_not_say_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert search_dtype(TABLE) is torch.float32


def test_float32_on_devices_that_are_not_known() -> None:
    assert search_dtype(TABLE.to("meta")) is torch.float32


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on any model and machine, emulated where it must be."""
    monkeypatch.setattr(precision, "WIDE", 1)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _device: True)


@pytest.mark.usefixtures("everywhere")
def test_rough_states_are_near_and_float32() -> None:
    model = tiny.loaded("bert")
    probe, site = Probe(model.module), sites_of(model.module).find(2, "value")
    assert site is not None
    ids = torch.tensor([model.tokenizer(tiny.SENTENCES[0])["input_ids"]])
    with left_as_found(model.module):
        exact, rough = (probe.states(site.layer, ids, rough=flag) for flag in (False, True))
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.02
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("everywhere")
def test_a_text_found_by_rough_scores_is_proven_by_exact_ones() -> None:
    model = tiny.loaded("bert")
    rows = [{"layers": "all", "share": False}, {"layers": "block[1].attention.query", "share": True}]
    seen, batch = messages.observe(model, rows, [LONG], [1], tell=())
    found = span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0))
    assert (found.sequences, found.certain) == ([batch.input_ids[0].tolist()], [True])
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    turned = replace(seen, message={name: value @ turn for name, value in seen.message.items() if value.dim() == 2})
    lost = span.PLUGIN.reconstruct(turned, rng=torch.Generator().manual_seed(0), budget=Budget(50, 500, 2))
    assert lost.sequences
    assert not any(lost.certain)


@pytest.mark.usefixtures("everywhere")
def test_promising_texts_carry_exact_scores_and_one_of_every_place() -> None:
    model = tiny.loaded("bert")
    rows = [{"layers": "all", "share": False}, {"layers": "block[1].attention.value", "share": True}]
    seen, batch = messages.observe(model, rows, [LONG], [1], tell=())
    true = batch.input_ids[0]
    evidence = gather(seen, usable(seen, sites_of(seen.model))[0], causal=False, most=1)[0]
    search = Search(Probe(seen.model), evidence, torch.zeros(len(true), dtype=torch.bool), 10**6)
    words = torch.arange(5, 25)
    texts = torch.stack([true.clone() for _ in range((len(true) - 2) * len(words))])
    places = [1 + k // len(words) for k in range(len(texts))]
    texts[torch.arange(len(texts)), torch.tensor(places)] = words.repeat(len(true) - 2)
    with left_as_found(seen.model):
        picked, energy, residuals = search.promising(texts, places)
        assert search.probe.scored == len(texts)  # an exact score of the same text is no other candidate
        all_energies, all_residuals = search.score(texts)
    assert SURE <= len(picked) <= SURE + len(true)
    assert {places[k] for k in picked} == set(places)
    assert int(all_energies.argmin()) in picked
    assert torch.allclose(energy, all_energies[picked], atol=1e-6)
    assert torch.allclose(residuals, all_residuals[picked], atol=1e-6)
