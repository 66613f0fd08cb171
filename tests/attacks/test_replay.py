"""Rows give the very gradients that autograd gives, for every kind of parameter and every family."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks import replay, replay_stacked
from dpguard.engine import gradients, wire
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import messages, tiny

LABELS = (0, 1, 1)
KINDS = (*tiny.FAMILIES, "llama", "llama-lora", "bert-lora")
"""Llama's norms divide by a root mean square; LoRA's matrices are small linear layers beside the frozen ones."""


def _setup(family: str, rows=()):
    model = tiny.loaded(family)
    plan = Policy(list(rows)).plan(slots(model.module))
    batch = collate(tiny.SENTENCES, LABELS, model.tokenizer)
    taps = replay.find_taps(model.module, [rule.slot for name, rule in plan.items() if name in set(plan.trained)])
    embeddings = model.module.get_input_embeddings().weight[batch.input_ids]
    return model, plan, batch, taps, embeddings


def _per_example(model, batch, names):
    return [gradients.gradient(model.module, batch.rows(slice(i, i + 1)), names) for i in range(len(batch))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_of_a_family_can_be_replayed(family: str) -> None:
    _, plan, _, taps, _ = _setup(family)
    assert set(taps) == set(plan)
    assert {tap.kind for tap in taps.values()} >= {"norm", "embedding"}


@pytest.mark.parametrize("family", KINDS)
def test_gradients_and_norms_are_those_of_autograd(family: str) -> None:
    model, plan, batch, taps, embeddings = _setup(family)
    true = _per_example(model, batch, plan.trained)
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)
    for name, tap in taps.items():
        wanted = torch.stack([g[name] for g in true])
        if tap.slot.role == "token_embedding":
            continue
        tolerance = {"rtol": 1e-4, "atol": 1e-6 * max(1.0, float(wanted.abs().max()))}
        torch.testing.assert_close(replay.form(tap, rows[tap.module]), wanted, **tolerance)
        squares = wanted.flatten(1).pow(2).sum(1)
        torch.testing.assert_close(replay.squared_norms(tap, rows[tap.module]), squares, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("ranks", "room"), [(0, 1 << 24), (2, 1 << 24), (0, 1), (2, 3_000)])
@pytest.mark.parametrize("family", KINDS)
def test_stacked_products_and_norms_are_those_of_autograd(family: str, ranks: int, room: int, monkeypatch) -> None:
    """All parameters at once or as many as there is room for, in their order; matrices of few ranks as factors."""
    monkeypatch.setattr(replay_stacked, "SKETCH", 4)
    monkeypatch.setattr(replay_stacked, "ROOM", room)
    model, plan, batch, taps, embeddings = _setup(family)
    true = _per_example(model, batch, plan.trained)
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)
    source, few = torch.Generator().manual_seed(1), [t for t in taps.values() if t.slot.role != "token_embedding"]
    values = [_drawn(tap.slot.shape, ranks * (1 + place % 2), source) for place, tap in enumerate(few)]
    stacked = replay_stacked.Stacked(few, values, [True] * len(few))
    large = any(min(tap.slot.shape) >= 16 for tap in few if tap.matrix)
    assert any(factors is not None for factors in stacked.thin) == (bool(ranks) and large)
    dots, squares = stacked([rows[tap.module] for tap in few])
    wanted = [torch.stack([g[tap.slot.name] for g in true]) for tap in few]
    products = torch.stack([(w * v).flatten(1).sum(1) for w, v in zip(wanted, values, strict=True)])
    norms = torch.stack([w.flatten(1).pow(2).sum(1) for w in wanted])
    torch.testing.assert_close(dots, products, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(squares, norms, rtol=1e-3, atol=1e-9)


def _drawn(shape, ranks: int, source: torch.Generator) -> torch.Tensor:
    """Normal entries; a matrix of so many ranks where that is not 0."""
    if not ranks or len(shape) < 2:
        return torch.randn(shape, generator=source)
    return torch.randn(shape[0], ranks, generator=source) @ torch.randn(ranks, shape[1], generator=source)


def test_a_message_without_noise_is_thin_and_one_with_little_noise_is_not() -> None:
    """The factors of a sum of outer products miss nothing that float32 could tell; noise of 1e-5 is left whole."""
    source = torch.Generator().manual_seed(0)
    matrix = sum(torch.outer(*torch.randn(2, 400, generator=source)) * 0.5**k for k in range(12))
    left, right = replay_stacked.thin(matrix)
    assert left.shape[1] == right.shape[1] == 12
    assert float((left @ right.T - matrix).norm() / matrix.norm()) < 1e-6
    assert replay_stacked.thin(matrix + 1e-5 * torch.randn(400, 400, generator=source) * matrix.std()) is None


def test_nothing_below_the_lowest_parameter_is_differentiated() -> None:
    model, _, batch, taps, embeddings = _setup("bert")
    one = {n: tap for n, tap in taps.items() if tap.slot.role == "mlp_out" and tap.matrix and tap.slot.block == 1}
    calls = []
    lowest = model.module.bert.encoder.layer[0].output.dense
    handle = lowest.register_full_backward_hook(lambda *_: calls.append(1))
    rows = replay.record(model.module, one, batch, embeddings, create_graph=False)
    handle.remove()
    assert set(rows) == {tap.module for tap in one.values()}
    assert not calls


def test_several_texts_in_one_message_add_up() -> None:
    model, plan, batch, taps, embeddings = _setup("bert")
    name = next(n for n, tap in taps.items() if tap.slot.role == "mlp_in" and tap.matrix)
    whole = sum(g[name] for g in _per_example(model, batch, plan.trained))
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)[taps[name].module].grouped(3)
    torch.testing.assert_close(replay.form(taps[name], rows)[0], whole, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(replay.squared_norms(taps[name], rows)[0], whole.pow(2).sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_clipping_is_the_clients_clipping(family: str) -> None:
    """Groups a policy withholds count for the norm, and every example is clipped for itself."""
    table = [{"layers": "all", "clip": 0.05}, {"layers": "block[1]", "clip": 0.02}, {"layers": "head", "share": False}]
    model, plan, batch, taps, embeddings = _setup(family, table)
    per_example = _per_example(model, batch, plan.trained)
    stacked = {name: torch.stack([g[name] for g in per_example]) for name in plan.trained}
    true = wire.clip_and_sum(stacked, plan)
    assert all(bool((norms > plan.groups[key].clip).all()) for key, norms in true.norms.items())
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)
    clipped = replay.clip_rows(rows, taps, plan)
    for name in plan.shared:
        tap = taps[name]
        if tap.slot.role == "token_embedding":
            continue
        formed = replay.form(tap, clipped[plan[name].group][tap.module].grouped(3))[0]
        # "the ... the" shares no row here but padding does not count: token embeddings are exact to 1 %
        torch.testing.assert_close(formed, true.sums[name], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_clip_of_the_whole_message_is_the_clients(family: str) -> None:
    """``unit: update`` clips the mean over the batch, and what is withheld counts for its norm."""
    table = [
        {"layers": "all", "clip": 0.02, "unit": "update"},
        {"layers": "head", "share": False},
        {"layers": "embeddings.token", "train": False},  # words that several texts have: see `squared_norms`
    ]
    model, plan, batch, taps, embeddings = _setup(family, table)
    seen, _ = messages.observe(model, table, tiny.SENTENCES, LABELS)
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)
    clipped = replay.clip_rows(rows, taps, plan, texts=3, batch_size=3)
    for name, sent in seen.message.items():
        tap = taps[name]
        formed = replay.form(tap, clipped[plan[name].group][tap.module].grouped(3))[0] / 3
        torch.testing.assert_close(formed, sent, rtol=1e-3, atol=1e-6)
    assert set(seen.message) == set(plan.shared)


def test_the_rows_can_be_differentiated_again() -> None:
    model, _, batch, taps, embeddings = _setup("bert")
    name = next(n for n, tap in taps.items() if tap.slot.role == "query" and tap.matrix)
    one = {name: taps[name]}
    start = embeddings.detach().double()
    model.module.double()
    target = torch.randn(taps[name].slot.shape, generator=torch.Generator().manual_seed(0)).double()
    stacked = replay_stacked.Stacked([taps[name]], [target], [True])

    def value(x: torch.Tensor) -> torch.Tensor:
        rows = replay.record(model.module, one, batch, x, create_graph=True)
        return stacked([rows[taps[name].module]])[0].sum()

    x = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(x), x)
    step = torch.randn(start.shape, generator=torch.Generator().manual_seed(2)).double() * 1e-5
    change = value((start + step).requires_grad_()) - value((start - step).requires_grad_())
    assert float(change.detach()) / 2 == pytest.approx(float((slope * step).sum()), rel=0.01)


def test_recording_leaves_no_hook_behind() -> None:
    model, _, batch, taps, embeddings = _setup("bert")
    replay.record(model.module, taps, batch, embeddings, create_graph=False)
    assert not any(module._forward_hooks for module in model.module.modules())


def test_token_embedding_tables_have_no_row_for_soft_tokens() -> None:
    model, _, batch, taps, embeddings = _setup("bert")
    tap = next(tap for tap in taps.values() if tap.slot.role == "token_embedding")
    rows = replay.record(model.module, taps, batch, embeddings, create_graph=False)
    with pytest.raises(ValueError, match="soft tokens"):
        replay.form(tap, rows[""])


def test_messages_helper_hides_nothing_from_the_attacker_but_the_truth() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:1], LABELS[:1])
    assert set(seen.message) == set(seen.disclosed.plan.shared)
