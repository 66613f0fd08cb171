"""The parts of the span attack: rank from a spectrum, pictures, states one by one, the continuous search."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks import span, span_rows
from dpguard.attacks.span_evidence import gather, twins
from dpguard.attacks.span_guess import activation, guess
from dpguard.attacks.span_rank import floor, span_of
from dpguard.attacks.span_relax import relax
from dpguard.attacks.span_rows import RowSolver, _open_share
from dpguard.attacks.span_ruler import ruler
from dpguard.attacks.span_search import Search
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from tests import messages, tiny

TEXT = tiny.SENTENCES[0]


def _product(rank: int, outputs: int = 80, inputs: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of known rank with a falling spectrum, and the inputs that it spans."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn((rank, inputs), generator=source)
    left = torch.randn((outputs, rank), generator=source) * torch.logspace(0, -1.5, rank)
    return left @ rows, rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 5, 20, 40])
def test_the_rank_is_read_off_the_spectrum_at_any_precision(rank: int, dtype: torch.dtype) -> None:
    gradient, rows = _product(rank)
    found = span_of(gradient.to(dtype).double())
    assert found is not None
    assert found.rank == rank
    residual, allowed = found.outside(rows)
    assert (residual <= allowed).all()
    assert found.complement().shape == (60 - rank, 60)
    assert (found.complement() @ found.basis.T).abs().max() < 1e-9


def test_other_vectors_lie_outside() -> None:
    gradient, rows = _product(10)
    found = span_of(gradient.double())
    assert found is not None
    assert found.holds(rows)
    assert not found.holds(rows + 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    assert not found.holds(rows[:0])


def test_a_span_that_fills_the_room_certifies_nothing() -> None:
    gradient, rows = _product(57, outputs=80)
    found = span_of(gradient.double())
    assert found is None or not found.holds(rows)


def test_no_span_in_noise_zeros_or_what_is_not_finite() -> None:
    source = torch.Generator().manual_seed(0)
    for shape in ((60, 60), (200, 60), (60, 200)):
        assert span_of(torch.randn(shape, generator=source).double()) is None
    assert span_of(torch.zeros(8, 8, dtype=torch.float64)) is None
    assert span_of(torch.full((8, 8), torch.nan, dtype=torch.float64)) is None


def test_claimed_noise_hides_what_is_below_its_edge() -> None:
    source = torch.Generator().manual_seed(0)
    gradient, rows = _product(10)
    values = torch.linalg.svdvals(gradient)
    for share, least, most in ((0.001, 10, 10), (0.3, 3, 9), (20.0, 0, 0)):
        std = share * float(values[9] if share < 0.01 else values[0]) / 17
        noisy = gradient + std * torch.randn(gradient.shape, generator=source)
        found = span_of(noisy.double(), noise=std)
        rank = 0 if found is None else found.rank
        assert least <= rank <= most
        if found is not None and rank == 10:
            residual, allowed = found.outside(rows)
            assert (residual <= allowed).all()


def _shared(selector: str) -> list[dict]:
    return [{"layers": "all", "share": False}, {"layers": selector, "share": True}]


def _case(family: str, selector: str, text: str = TEXT):
    seen, batch = messages.observe(tiny.loaded(family), _shared(selector), [text], [1], tell=())
    case = span._case(seen, torch.Generator().manual_seed(0), span.PLUGIN.presets["default"])
    shared = [site for site in sites_of(seen.model).all if site.name in seen.message]
    (evidence,) = gather(seen, shared, causal=case.probe.family.causal, most=1)
    return seen, case, evidence, batch.input_ids[0]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("role", ["query", "key", "value", "output"])
def test_a_picture_ranks_the_true_tokens_first_without_any_search(family: str, role: str) -> None:
    seen, case, evidence, ids = _case(family, f"block[1].attention.{role}")
    with left_as_found(seen.model):
        table = guess(evidence, case.sites, case.album, len(ids), case.tokens)
    assert table is not None
    likely = table.best(6)
    ranks = [int((likely[p] == ids[p]).any()) for p in range(1, len(ids) - 1)]
    assert sum(ranks) >= 0.8 * len(ranks)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_states_found_one_by_one_are_the_clients_own(family: str) -> None:
    seen, case, evidence, ids = _case(family, "block[1].mlp.out")
    seat = case.sites.find(1, "mlp_in")
    solver = RowSolver(case.probe, evidence, seat, torch.nn.functional.gelu, case.frame, case.rng)
    if family == "gpt2":
        solver.act = activation(seen.model.config)
    with left_as_found(seen.model):
        picture = case.album.picture(seat.name, seat.layer, len(ids))
        found = solver.solve(picture, case.tokens, len(ids), 3000).states
        true = case.probe.states(seat.layer, ids[None])[0]
    distance = torch.cdist(found, true) / true.norm(dim=1)
    assert len(found) >= len(ids) - case.frame.size - 1
    assert (distance.min(dim=1).values < 0.05).float().mean() >= 0.8
    assert 0 < solver.steps <= 3000


def test_descents_start_where_tokens_explain_what_is_left_of_the_span(monkeypatch: pytest.MonkeyPatch) -> None:
    _, case, evidence, ids = _case("bert", "block[0].mlp.out")
    seat = case.sites.find(0, "mlp_in")
    solver = RowSolver(case.probe, evidence, seat, torch.nn.functional.gelu, case.frame, case.rng)
    with left_as_found(case.probe.model):
        picture = case.album.picture(seat.name, seat.layer, len(ids))
        scale = ruler(case.probe, picture, case.tokens, len(ids))
        inner = scale.places[1:-1]
        few = 2 * len(inner)
        monkeypatch.setattr(span_rows, "SCREENED", few)
        monkeypatch.setattr(span_rows, "NEAREST", few * span_rows.AT_MOST)
        true = case.probe.states(seat.layer, ids[None])[0]
        typical = solver._inside(scale.tokens + inner.mean(0))
        places = torch.arange(1, len(ids) - 1)
        rows = scale.tokens[torch.searchsorted(case.tokens, ids[1:-1])][:, None] + inner

        def started(taken: torch.Tensor | None) -> torch.Tensor:
            near = solver._nearest(scale, taken, places, typical)
            assert len(near) <= few * span_rows.AT_MOST
            return (torch.cdist(rows.flatten(0, 1), near) < 1e-4).any(dim=1).reshape(rows.shape[:2]).any(dim=1)

        count = len(started(None))
        chance = few / len(case.tokens)
        assert started(None).float().mean() > 2 * chance
        known = solver._taken(true[: count // 2])
        assert known is not None
        assert len(known) == count // 2
        rest = started(known)[count // 2 :].float()
        assert rest.mean() > 2 * chance
        share = _open_share(solver._inside(true), known)
    assert share.max() < 1e-3
    assert _open_share(typical, known).median() > 0.1


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_nothing_is_proven_where_two_words_have_nearly_the_same_embedding(family: str) -> None:
    """Words that were added to a vocabulary start close to one another."""
    model = tiny.loaded(family)
    table = model.module.get_input_embeddings().weight.data
    ids = model.tokenizer(TEXT)["input_ids"]
    word = ids[len(ids) // 2]
    twin = next(token for token in range(len(tiny.SPECIAL), len(table)) if token not in ids)
    seen, _ = messages.observe(model, _shared("block[1].mlp.in.weight"), [TEXT], [1], tell=())
    assert _certain(seen, ids) == [True]
    table[twin] = table[word] * (1 + 1e-7)
    assert _certain(seen, ids) == [False]
    other = [twin if token == word else token for token in ids]
    assert [token.tolist() for token in twins(table, torch.tensor(ids))] == [other] * ids.count(word)


def _certain(seen, ids) -> list[bool]:
    with left_as_found(seen.model):
        shared = [site for site in sites_of(seen.model).all if site.name in seen.message]
        found = gather(seen, shared, causal=Probe(seen.model).family.causal, most=1)
        return [e.certifies(Probe(seen.model), torch.tensor(ids))[0] for e in found]


def test_what_the_budget_cuts_off_is_tried_later() -> None:
    seen, case, evidence, ids = _case("bert", "block[1].attention.value")
    with left_as_found(seen.model):
        search = Search(case.probe, evidence, case.fixed(len(ids))[0], 100)
        trail = search.start(ids[None])
        search.limit = case.probe.scored + 2
        edits = [((1, token),) for token in range(len(tiny.SPECIAL), len(tiny.SPECIAL) + 9)]
        first = search._new(trail, iter(edits))
        assert len(first) == 2
        search.limit += 100
        later = search._new(trail, iter(edits))
    changed = {int(text[1]) for _, text in (*first, *later)} | {int(ids[1])}
    assert changed >= {token for ((_, token),) in edits}


def test_the_continuous_search_leads_back_to_the_text() -> None:
    seen, case, evidence, ids = _case("bert", "block[1].attention.value")
    held = case.fixed(len(ids))[0]
    embeddings = case.probe.embedding[ids]
    noise = torch.randn((4, *embeddings.shape), generator=torch.Generator().manual_seed(0))
    start = torch.where(held[:, None], embeddings, embeddings + 1.5 * noise * embeddings.std())
    with left_as_found(seen.model):
        before = (case.table.nearest(start)[..., 0] == ids).float().mean()
        found, steps = relax(case.probe, evidence, start, held, steps=150)
        after = (case.table.nearest(found)[..., 0] == ids).float()[:, ~held].mean(dim=1).max()
        energy = evidence.energy(case.probe.relaxed(evidence.site.layer, found))[0]
        first = evidence.energy(case.probe.relaxed(evidence.site.layer, start))[0]
    assert 0 < steps <= 150
    assert float(energy.min()) < float(first.min())
    assert after > before
    assert torch.equal(found[:, held], start[:, held])


def test_layers_of_a_model_by_block_and_role() -> None:
    for family in tiny.FAMILIES:
        sites = sites_of(tiny.module(family))
        roles = {site.role for site in sites.all}
        assert sites.last_block == 2
        assert roles == (
            {"qkv", "attention_output", "mlp_in", "mlp_out"}
            if family == "gpt2"
            else {"query", "key", "value", "attention_output", "mlp_in", "mlp_out"}
        )
        for site in sites.all:
            assert site.transposed == (family == "gpt2")
            weight = site.layer.get_parameter("weight")
            expected = weight.shape[0] if site.transposed else weight.shape[1]
            assert site.oriented(weight).shape[1] == expected


@pytest.mark.parametrize(("outputs", "inputs"), [(80, 60), (60, 80), (300, 60)])
def test_the_floor_of_a_spectrum_is_the_level_of_its_noise(outputs: int, inputs: int) -> None:
    gradient = _product(20, outputs, inputs)[0].double()
    error = 1e-3 * torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    level = floor(torch.linalg.svdvals(gradient + error), outputs, inputs)
    assert level == pytest.approx(1e-3, rel=0.1)
    found = span_of(gradient + error, drifted=True)
    assert found is not None
    assert found.rank == 20
    assert found.blurred
    assert not found.holds(_product(20, outputs, inputs)[1])


def test_nothing_but_floor_has_no_span() -> None:
    source = torch.Generator().manual_seed(0)
    for shape in ((60, 60), (200, 60)):
        assert span_of(torch.randn(shape, generator=source).double(), drifted=True) is None
