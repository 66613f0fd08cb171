"""Whole batches from one message: every text exact, proven, and nothing else proven."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from scipy.optimize import nnls

from dpguard.attacks import span
from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation
from dpguard.attacks.span_block import first_block
from dpguard.attacks.span_evidence import gather
from dpguard.attacks.span_members import MemberSolver, nonnegative
from dpguard.attacks.span_pool import pool_of
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from dpguard.attacks.vocabulary import frame_of
from tests import messages, tiny

WITHHELD = [{"layers": "embeddings", "share": False}]
LEAST = ("attention.query", "mlp.in", "mlp.out")
"""Three weights of the first block that are enough: which pairs there may be, their states, the proof."""
TEXTS = (*tiny.SENTENCES[:2], "please call her", "the card is lost and found")
WIDTH = 96
"""Of the tiny models: more than the tokens of four texts."""


def _only(*parts: str) -> list[dict]:
    return [{"layers": "all", "share": False}, {"layers": [f"block[0].{p}.weight" for p in parts], "share": True}]


def _seen(rows: list[dict], texts=TEXTS, family: str = "bert", *, told: bool = False, **options):
    """A message of some texts, with their number withheld unless told, and the true token ids."""
    model = tiny.loaded(family, width=WIDTH)
    labels = [i % 2 for i in range(len(texts))]
    seen, batch = messages.observe(model, rows, texts, labels, tell=(), **options)
    seen = seen if told else replace(seen, disclosed=replace(seen.disclosed, sequences=None))
    lengths = batch.attention_mask.sum(1).tolist()
    return seen, [ids[:length].tolist() for ids, length in zip(batch.input_ids, lengths, strict=True)]


def _run(seen: Observation, seed: int = 0, **options):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(seed), **options)


def _exact(found, true: list[list[int]]) -> None:
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)
    assert found.notes["complete"]
    assert found.notes["explained"] == sum(map(len, true))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("rows", [WITHHELD, [], _only(*LEAST)], ids=["embeddings withheld", "all shared", "least"])
def test_every_text_of_a_batch_is_found_and_proven(family: str, rows: list[dict]) -> None:
    seen, true = _seen(rows, family=family)
    assert span.PLUGIN.applicable(seen) == ""
    _exact(_run(seen), true)


@pytest.mark.parametrize(
    "parts",
    [
        ("attention.key", "attention.output", "mlp.in", "mlp.out"),
        ("attention.value", "attention.output", "mlp.out"),
        ("attention.query", "mlp.out"),
    ],
    ids="+".join,
)
def test_what_is_shared_is_used(parts: tuple[str, ...]) -> None:
    seen, true = _seen(_only(*parts))
    _exact(_run(seen), true)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("preset", list(span.PLUGIN.presets))
def test_the_number_of_texts_is_found_too(count: int, preset: str) -> None:
    seen, true = _seen(WITHHELD, TEXTS[:count])
    _exact(_run(seen, preset=preset), true)


@pytest.mark.parametrize("rows", [WITHHELD, _only("attention.query")], ids=["withheld", "one matrix"])
def test_a_public_divisor_of_one_is_one_text(rows: list[dict]) -> None:
    seen, true = _seen(rows, TEXTS[:1])
    found = _run(seen)
    assert (found.sequences, found.certain) == (true, [True])


def test_texts_that_share_words_and_places_are_told_apart() -> None:
    seen, true = _seen(WITHHELD, ("the card is lost", "the card is found", "the test is lost", "is the card lost"))
    _exact(_run(seen), true)


def test_a_text_that_is_there_twice_is_explained_once_and_found_twice() -> None:
    seen, true = _seen(WITHHELD, (TEXTS[0], TEXTS[1], TEXTS[0]), told=True)
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * 3
    assert found.notes["complete"]
    assert found.notes["explained"] == sum(map(len, true[:2]))


def test_a_message_in_bfloat16() -> None:
    """Rounding hides whole directions, so that less is proven; what is found is right all the same."""
    for texts in (TEXTS[:2], TEXTS):
        seen, true = _seen(WITHHELD, texts)
        rounded = {name: value.bfloat16().float() for name, value in seen.message.items()}
        found = _run(replace(seen, message=rounded))
        assert sorted(found.sequences) == sorted(true)


def test_a_clip_changes_weights_of_texts_and_hides_none() -> None:
    seen, true = _seen([{"layers": "all", "clip": 1e-3}, *WITHHELD])
    _exact(_run(seen), true)


def test_more_tokens_than_the_model_is_wide_leave_the_bag_and_drafts_of_which_none_is_certain() -> None:
    long = [" ".join(tiny.WORDS[i : i + 20]) for i in (0, 7, 14, 21, 28)]
    seen, true = _seen(WITHHELD, long, told=True)
    found = _run(seen)
    frame = frame_of(seen.disclosed.tokenizer)
    words = {token for ids in true for token in ids} - {*frame.prefix, *frame.suffix}
    assert words <= set(found.notes["bag"])
    assert len(found.sequences) == len(long)
    assert not any(found.certain)
    assert len(words & {token for ids in found.sequences for token in ids}) >= 0.5 * len(words)
    assert "more tokens than the model is wide" in found.notes["reason"]


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_a_message_that_says_nothing_proves_nothing(spoil) -> None:
    for seed in range(5):
        for known in (True, False):
            seen = spoil(_seen(WITHHELD, told=known)[0], seed=seed)
            found = _run(seen, seed=seed)
            assert not any(found.certain)
            assert found.sequences or found.notes["reason"]


def test_noise_far_above_the_signal_leaves_nothing() -> None:
    seen, _ = _seen([{"layers": "all", "clip": 1.0, "noise": 1.0}])
    found = _run(seen)
    assert (found.sequences, found.certain) == ([], [])
    assert "noise" in found.notes["reason"]


def test_a_space_that_no_text_spans_is_never_certain() -> None:
    """Mixing the inputs' coordinates keeps ranks and spectra and makes every row wrong."""
    for seed in range(3):
        seen, _ = _seen(WITHHELD)
        source = torch.Generator().manual_seed(seed)
        mixed = {
            name: value[:, torch.randperm(value.shape[1], generator=source)] if value.dim() == 2 else value
            for name, value in seen.message.items()
        }
        found = _run(replace(seen, message=mixed), budget=Budget(steps=60, candidates=400))
        assert not any(found.certain)


def test_the_wrong_span_of_one_weight_leaves_nothing_proven() -> None:
    """Weights of two different batches: whatever fits one of them contradicts the other."""
    one, other = _seen(WITHHELD)[0], _seen(WITHHELD, ("no pain in arm", "please help her"))[0]
    name = next(n for n in one.message if "layer.0.output.dense.weight" in n)
    assert not any(_run(replace(one, message={**one.message, name: other.message[name]})).certain)


def test_same_seed_same_answer_within_the_budget() -> None:
    seen, _ = _seen(WITHHELD)
    assert _run(seen, seed=3) == _run(seen, seed=3)
    for budget in (Budget(steps=0, candidates=5), Budget(steps=9, candidates=60)):
        found = _run(seen, budget=budget)
        assert found.candidates <= budget.candidates + 20
        assert found.steps <= budget.steps + 3


def test_no_more_texts_than_the_message_is_known_to_have() -> None:
    seen, _ = _seen(WITHHELD, told=True)
    fewer = replace(seen, disclosed=replace(seen.disclosed, sequences=2))
    assert len(_run(fewer).sequences) == 2


def test_what_a_batch_cannot_be_read_from_is_refused_with_the_reason() -> None:
    def reason(rows: list[dict], family: str = "bert") -> str:
        return span.PLUGIN.applicable(_seen(rows, family=family)[0])

    assert "first block's MLP output" in reason(_only("attention.query"))
    assert "query, key or value" in reason(_only("mlp.out"))
    assert "what is left of it" in reason(_only("attention.query"), "llama")
    assert "pruned or rounded" in reason([{"layers": "all", "bits": 8}])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_block_in_plain_matrices_is_the_models(family: str) -> None:
    model = tiny.loaded(family).module
    with left_as_found(model):
        probe, sites = Probe(model), sites_of(model)
        block = first_block(probe, sites)
        assert block is not None
        ids = torch.tensor([2, 9, 30, 12, 3])
        rows = block.embed(ids, torch.arange(5))
        states = block.states(rows, block.mixtures(rows, rows))
        site = sites.find(0, "mlp_out")
        assert site is not None
        theirs = probe.states(site.layer, ids[None])[0]
        assert torch.allclose(block.act(block.mlp_in(states)).float(), theirs, atol=1e-5)


def test_a_block_of_another_kind_is_none() -> None:
    for family in ("gpt2", "llama"):
        model = tiny.loaded(family).module
        assert first_block(Probe(model), sites_of(model)) is None


def test_the_pool_holds_every_true_pair_and_one_row_names_its_text() -> None:
    seen, true = _seen(WITHHELD)
    with left_as_found(seen.model):
        probe, sites = Probe(seen.model), sites_of(seen.model)
        block = first_block(probe, sites)
        assert block is not None
        tokenizer = seen.disclosed.tokenizer
        readers = gather(seen, [s for s in sites.all if s.block == 0 and s.role == "query"], causal=False, most=1)
        allowed = torch.arange(len(probe.embedding))
        pool = pool_of(block, readers, allowed, frame_of(tokenizer), torch.Generator().manual_seed(0))
    pairs = [pool.pair(i) for i in range(len(pool))]
    assert {(p, t) for ids in true for p, t in enumerate(ids)} <= set(pairs)
    assert len(pairs) < len(allowed) * max(map(len, true)) / 4
    ids = torch.tensor(true[0])
    rows, solver = block.embed(ids, torch.arange(len(ids))), MemberSolver(block, pool)
    for place in (0, 3):
        mixture = block.mixtures(rows[place][None], rows)[0]
        known = list(dict.fromkeys([pairs.index((place, true[0][place])), pairs.index((0, true[0][0]))]))
        found = solver.solve(mixture, known, torch.arange(len(pool)))
        assert found.text(frame_of(tokenizer)) == true[0]


def test_non_negative_least_squares_by_column_generation_is_the_whole_problems() -> None:
    source = torch.Generator().manual_seed(0)
    columns = torch.randn((30, 400), generator=source, dtype=torch.float64)
    for target in (columns[:, [3, 70, 311]].sum(1), torch.randn(30, generator=source, dtype=torch.float64)):
        mine = nonnegative(columns, target)
        theirs = torch.as_tensor(nnls(columns.numpy(), target.numpy())[0])
        assert (mine >= 0).all()
        assert (columns @ mine - target).norm() <= (columns @ theirs - target).norm() + 1e-8
    assert nonnegative(columns[:, :0], columns[:, 0]).shape == (0,)


@pytest.mark.parametrize("selector", ["block[0].mlp.in", "block[1].attention", "block[1].mlp.out"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_of_decoders_grow_as_a_tree_of_prefixes(family: str, selector: str) -> None:
    texts = (*TEXTS, "please call her about the test")  # two texts begin with the same three words
    seen, true = _seen([{"layers": "all", "share": False}, {"layers": selector, "share": True}], texts, family)
    found = _run(seen)
    leaves = [ids for ids in true if ids != true[2]]  # the beginning of another text leaves no trace of its own
    assert sorted(found.sequences) == sorted(leaves)
    assert found.certain == [True] * len(leaves)
    assert found.notes["complete"]


def test_a_repeated_first_token_is_not_proven_where_positions_are_relative() -> None:
    """Its state is the same however often it is repeated."""
    rows = [{"layers": "all", "share": False}, {"layers": "block[1].mlp.in", "share": True}]
    for text in ("card", "card card"):
        seen, _ = _seen(rows, (text, "please call her"), "llama")
        found = _run(seen)
        for ids, certain in zip(found.sequences, found.certain, strict=True):
            assert certain == (len(ids) == 3)


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoders_message_that_says_nothing_proves_nothing(spoil, family: str) -> None:
    for seed in range(3):
        assert not any(_run(spoil(_seen([], family=family)[0], seed=seed)).certain)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "size", "batches"), [("cola", 8, 2), ("rotten_tomatoes", 4, 1)])
def test_real_batches(minilm, data_folder, data: str, size: int, batches: int) -> None:
    rows = [json.loads(line) for line in (data_folder / f"{data}.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(101).shuffle(rows)
    for k in range(batches):
        part = rows[k * size : (k + 1) * size]
        seen, batch = messages.observe(
            minilm, WITHHELD, [row["text"] for row in part], [row["label"] for row in part], tell=()
        )
        seen = replace(seen, disclosed=replace(seen.disclosed, sequences=None))
        lengths = batch.attention_mask.sum(1).tolist()
        _exact(_run(seen), [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)])


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_nothing_is_certain_of_a_wide_message_that_holds_no_text(spoil) -> None:
    seen, _ = _seen(WITHHELD, [tiny.SENTENCES[0]] * 16)
    assert not any(_run(spoil(seen)).certain)
