"""Decoders: prefix by prefix from any weight behind a text's attention, last tokens from how they were predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span, span_tree
from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.attacks.span_cache import Extender
from dpguard.attacks.span_last import last_tokens
from dpguard.attacks.span_rank import Span
from dpguard.attacks.span_screen import Screen
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from dpguard.attacks.span_spectrum import by_gap
from dpguard.engine.client import Client
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import predicts_tokens, slots
from dpguard.policy.table import Policy
from tests import messages, tiny

TEXTS = (tiny.SENTENCES[0], "please call her about the card", "please call her bank today")
"""Two of them begin with the same words."""
WIDTH = 96


def _only(selector: str) -> list[dict]:
    return [{"layers": "all", "share": False}, {"layers": selector, "share": True}]


def _seen(
    family: str, selector: str, texts=TEXTS, *, told: bool = True, lengths: bool = False, clip: float = 0.0, **options
) -> tuple[Observation, list[list[int]]]:
    """A message of a decoder, classifier or language model, and the true token ids."""
    model = tiny.loaded(family, width=WIDTH, **options)
    batch = collate(list(texts), [i % 2 for i in range(len(texts))], model.tokenizer)
    if family.endswith("-lm"):
        following = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        batch = Batch(batch.input_ids, batch.attention_mask, following)
    rows = _only(selector)
    rows[1] |= {"clip": clip} if clip else {}
    plan = Policy(rows).plan(slots(model.module))
    update = Client(model.module, plan, seed=0).observe(batch)
    counts = batch.attention_mask.sum(1).tolist()
    known = Disclosed(
        model.tokenizer, plan, update.batch_size, sequences=len(texts) if told else None,
        lengths=tuple(counts) if lengths else None,
    )  # fmt: skip
    true = [ids[:n].tolist() for ids, n in zip(batch.input_ids, counts, strict=True)]
    return Observation(update.tensors, model.module, known), true


def _run(seen: Observation, seed: int = 0, **options):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(seed), **options)


def _sites(family: str) -> str:
    return "attention.qkv" if family.startswith("gpt2") else "attention.value"


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one text", "three"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifiers_inner_blocks(family: str, texts) -> None:
    for selector in (f"block[1].{_sites(family)}.weight", "block[0].mlp.in.weight", "block[1].mlp.out.weight"):
        seen, true = _seen(family, selector, texts, told=len(texts) == 1)
        assert span.PLUGIN.applicable(seen) == ""
        found = _run(seen)
        assert sorted(found.sequences) == sorted(true)
        assert found.certain == [True] * len(true)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one text", "three"])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("family", ["gpt2-lm", "llama-lm"])
def test_a_language_models_blocks_and_the_last_tokens(family: str, block: int, texts) -> None:
    """The last block too: every position but the last is graded there."""
    seen, true = _seen(family, f"block[{block}].{_sites(family)}.weight", texts)
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)
    assert "prediction" in found.notes["last_tokens"]


def test_a_classifiers_last_block_is_refused() -> None:
    assert "have the rank of the texts" in span.PLUGIN.applicable(_seen("gpt2", "block[2].attention.qkv.weight")[0])


@pytest.mark.parametrize("family", ["gpt2-lm", "llama-lm"])
def test_last_tokens_are_only_proven_by_the_gradient(family: str) -> None:
    seen, true = _seen(family, f"block[1].{_sites(family)}.weight")
    with left_as_found(seen.model):
        site = next(s for s in sites_of(seen.model).all if s.name in seen.message)
        tokens = torch.arange(5, len(tiny.SPECIAL) + len(tiny.WORDS))
        inputs = [ids[:-1] for ids in true]
        good = last_tokens(seen, site, inputs, tokens)
        assert (good.tokens, good.certain) == ([ids[-1] for ids in true], True)
        wrong = [[*inputs[0][:-1], 60], *inputs[1:]]
        bad = last_tokens(seen, site, wrong, tokens)
        assert not bad.certain
        assert "explained but for" in bad.reason
        few = last_tokens(seen, site, inputs, torch.tensor([i for i in tokens.tolist() if i != true[0][-1]]))
        assert not few.certain
        assert not site.layer.get_parameter("weight").requires_grad


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one text", "three"])
@pytest.mark.parametrize("family", ["gpt2-lm", "llama-lm"])
def test_last_tokens_are_found_where_every_text_was_clipped(family: str, texts) -> None:
    seen, true = _seen(family, f"block[1].{_sites(family)}.weight", texts, clip=1e-3)
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)


def test_last_tokens_of_a_mean_of_clients() -> None:
    (one, mine), (two, theirs) = (_seen("gpt2-lm", "block[1].attention.qkv.weight", (text,)) for text in TEXTS[:2])
    mean = {name: (value + two.message[name]) / 2 for name, value in one.message.items()}
    found = _run(replace(one, message=mean, disclosed=replace(one.disclosed, clients=2, sequences=2)))
    assert sorted(found.sequences) == sorted([*mine, *theirs])
    assert found.certain == [True, True]


def test_a_last_token_is_not_proven_where_another_one_predicts_the_same() -> None:
    seen, true = _seen("gpt2-lm", "block[1].attention.qkv.weight", TEXTS[:1])
    site = next(s for s in sites_of(seen.model).all if s.name in seen.message)
    tokens = torch.arange(5, len(tiny.SPECIAL) + len(tiny.WORDS))
    head = seen.model.get_output_embeddings().weight.data
    other = 6 if true[0][-1] != 6 else 7
    with left_as_found(seen.model):
        assert last_tokens(seen, site, [true[0][:-1]], tokens).certain
        head[other] = head[true[0][-1]] * (1 + 1e-6)
        assert not last_tokens(seen, site, [true[0][:-1]], tokens).certain


def test_told_lengths_count_the_token_that_no_layer_sees() -> None:
    seen, true = _seen("llama-lm", "block[1].attention.query.weight", TEXTS[:1], lengths=True)
    assert _run(seen).sequences == true


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_as_long_as_the_model_reads(family: str) -> None:
    longest = len(TEXTS[0].split())
    option = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[family]
    seen, true = _seen(family, f"block[1].{_sites(family)}.weight", **{option: longest})
    assert max(map(len, true)) == longest
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * 3


def test_which_models_predict_tokens() -> None:
    assert [predicts_tokens(tiny.module(f)) for f in ("gpt2", "gpt2-lm", "llama", "llama-lm", "bert")] == [
        False, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_repeated_first_word(family: str) -> None:
    texts = ("no no pain in arm", "yes no pain")
    seen, true = _seen(family, "block[1].mlp.in.weight", texts)
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True, True]


@pytest.mark.parametrize("text", ["please call her about the new card"])
def test_the_first_blocks_values_give_a_bag_and_the_gradient_its_order(text: str) -> None:
    seen, true = _seen("llama", "block[0].attention.value.weight", (text,))
    found = _run(seen)
    assert found.sequences == [true[0]]
    assert found.certain == [True]
    clipped = replace(seen, message={name: value * 0.01 for name, value in seen.message.items()})
    assert _run(clipped).sequences == found.sequences
    few = _run(seen, budget=Budget(0, 5))
    assert few.certain == [False]


@pytest.mark.parametrize("text", ["no pain no", "please no pain in no arm"])
def test_words_that_occur_twice_in_a_bag(text: str) -> None:
    """The bag has each once: the gradient says how often, and where."""
    seen, true = _seen("llama", "block[0].attention.value.weight", (text,))
    found = _run(seen)
    assert found.sequences == [true[0]]
    assert found.notes["rank"] == len(set(true[0])) < len(true[0])
    assert found.certain == [True]


def test_a_text_that_another_one_goes_on_from() -> None:
    """It leaves no trace of its own under classification."""
    seen, true = _seen("gpt2", "block[1].mlp.in.weight", ("please call her", "please call her today"))
    found = _run(seen)
    assert found.sequences == [true[1]]
    assert found.certain == [True]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_cached_states_are_those_of_the_whole_text(family: str) -> None:
    model = tiny.loaded(family).module
    with left_as_found(model):
        probe = Probe(model)
        site = next(s for s in sites_of(model).all if s.block == 2 and s.role in {"qkv", "value"})
        tokens = torch.arange(5, 40)
        for prefix in ([], [7], [9, 30, 12, 12, 8]):
            texts = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(35, -1), tokens[:, None]], dim=1)
            whole = probe.states(site.layer, texts)[:, -1]
            before = probe.scored
            assert torch.allclose(Extender(probe, site.layer).states(prefix, tokens), whole, atol=1e-5)
            assert probe.scored == before + 35


def test_the_screen_puts_the_token_of_the_span_first() -> None:
    source = torch.Generator().manual_seed(0)
    embedding = torch.randn((600, 24), generator=source)
    basis = torch.linalg.qr(torch.randn((24, 8), generator=source, dtype=torch.float64)).Q.T
    map_ = torch.randn((24, 24), generator=source, dtype=torch.float64)
    states = embedding.double() @ map_ + 0.1 * torch.randn((600, 24), generator=source, dtype=torch.float64)
    states[431] = states[431] @ basis.T @ basis
    moved = torch.linalg.solve(map_.T, states[431])
    embedding[431] = moved.float()
    span_ = Span(basis, torch.ones(8, dtype=torch.float64), 0.0, 24)
    screen = Screen(span_, embedding)
    for rows in (torch.arange(0, 400), torch.arange(0, 60)):  # a second prefix needs fewer examples
        assert 431 in screen.rank(rows, states[rows])[:10].tolist()


def test_a_gap_in_the_spectrum_adds_what_the_bound_on_rounding_leaves_out() -> None:
    source = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn((60, 60), generator=source, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn((60, 60), generator=source, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([1.0, 0.5, 1e-5, 4e-6]), torch.linspace(2e-7, 1e-7, 56)]).double()
    matrix = left @ torch.diag(values) @ right.T
    known = Span(right[:, :2].T, values[:2], 1e-12, 60)
    assert by_gap(matrix, known).rank == 4
    even = left @ torch.diag(torch.cat([values[:2], torch.linspace(2e-6, 1e-6, 58)]).double()) @ right.T
    assert by_gap(even, known).rank == 2
    assert by_gap(matrix, replace(known, blurred=True)).rank == 2


def test_lists_of_likely_tokens_find_what_all_of_them_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 67 words, treated as a large one."""
    monkeypatch.setattr(span_tree, "FEW_TOKENS", 10)
    monkeypatch.setattr(span_tree, "FIRST_SAMPLE", 40)
    monkeypatch.setattr(span_tree, "SAMPLES", (16, 30))
    monkeypatch.setattr(span_tree, "LISTS", (2, 4, 8))
    for family in ("gpt2", "llama"):
        seen, true = _seen(family, "block[1].mlp.in.weight")
        found = _run(seen)
        assert sorted(found.sequences) == sorted(true)
        assert found.certain == [True] * 3
        again = _run(seen)
        assert (again.sequences, again.candidates) == (found.sequences, found.candidates)
        short = _run(seen, budget=Budget(0, 1))
        assert short.candidates <= span_tree.PIECES
        assert not any(short.certain)


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
@pytest.mark.parametrize("family", ["gpt2-lm", "llama-lm"])
def test_a_language_models_message_that_says_nothing_proves_nothing(spoil, family: str) -> None:
    for texts in (TEXTS[:1], TEXTS):
        for seed in range(2):
            assert not any(_run(spoil(_seen(family, "block[1]", texts)[0], seed=seed)).certain)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt2-lm", "llama-lm"])
def test_what_is_certain_is_right_where_texts_hide_one_another(family: str) -> None:
    for texts in (
        ("please call her", "please call her today"),
        ("no pain", "no pain"),
        ("no", "please call her"),
        ("no no", "no"),
        ("no no no pain", "no pain"),
        ("no no",),
        ("no no pain",),
    ):
        for selector in ("block[1].mlp.in.weight", f"block[1].{_sites(family)}.weight"):
            seen, true = _seen(family, selector, texts)
            found = _run(seen)
            sure = [ids for ids, certain in zip(found.sequences, found.certain, strict=True) if certain]
            assert all(ids in true for ids in sure)
            assert found.sequences


BATCH = (TEXTS[0], TEXTS[2], "no pain no help yet", "the bank got the money soon", "the card got lost")
"""Words that occur twice in a text, and at the same places of several; each has one that no other has."""


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("family", ["gpt2", "gpt2-lm"])
def test_a_batch_from_the_first_blocks_qkv(family: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if trained:  # gains, and biases of the layers that start with none
        monkeypatch.setattr(tiny, "loaded", _with_biases(tiny.loaded))
    seen, true = _seen(family, "block[0].attention.qkv.weight", BATCH, told=False)
    assert span.PLUGIN.applicable(seen) == ""
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * len(true)
    assert found.notes["unexplained"] == 0
    again = _run(seen, seed=1)
    assert again.sequences == found.sequences
    for spoil in (messages.shuffled, messages.noise):
        assert not any(_run(spoil(seen, seed=0)).certain)


def _with_biases(loaded):
    def made(family: str, **options):
        model = loaded(family, **options)
        source = torch.Generator().manual_seed(3)
        for parameter in model.module.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=source))
        return model

    return made


@pytest.mark.parametrize("family", ["gpt2", "gpt2-lm"])
def test_a_text_longer_than_half_a_heads_width_and_words_said_five_times(family: str) -> None:
    long = "the old doctor asked about her pain today but his new patient never"
    seen, true = _seen(
        family, "block[0].attention.qkv.weight", (long, "card is lost", "two no no two no no help two no")
    )
    found = _run(seen)
    assert sorted(found.sequences) == sorted(true)
    assert found.certain == [True] * 3


@pytest.mark.parametrize("family", ["gpt2", "gpt2-lm"])
def test_a_text_without_a_word_of_its_own_is_missed_and_said_so(family: str) -> None:
    hidden = "bank got her no help"
    seen, true = _seen(family, "block[0].attention.qkv.weight", (*BATCH, hidden))
    found = _run(seen)
    sure = [ids for ids, certain in zip(found.sequences, found.certain, strict=True) if certain]
    assert all(ids in true for ids in sure)
    assert true[-1] not in found.sequences
    assert len(found.sequences) == len(BATCH)
    assert found.notes["unexplained"] > 0


def test_the_first_blocks_qkv_under_noise_says_why() -> None:
    seen, _ = _seen("gpt2", "block[0].attention.qkv.weight", BATCH)
    rounded = replace(seen, message={name: value.bfloat16().float() for name, value in seen.message.items()})
    found = _run(rounded)
    assert found.sequences == []
    assert "rounding" in found.notes["reason"]


@pytest.mark.parametrize("family", ["gpt2", "gpt2-lm"])
def test_what_the_first_blocks_qkv_proves_is_right_where_texts_hide_one_another(family: str) -> None:
    for texts in (
        ("please call her", "please call her today"),
        ("no pain", "no pain"),
        ("no", "please call her"),
        ("no no", "no"),
        ("no no no pain", "no pain"),
        ("card lost", "lost money soon", "money card"),
        ("pain in arm today", "in arm today pain", "arm pain in"),
    ):
        seen, true = _seen(family, "block[0].attention.qkv.weight", texts)
        found = _run(seen)
        sure = [ids for ids, certain in zip(found.sequences, found.certain, strict=True) if certain]
        assert all(ids in true for ids in sure)
