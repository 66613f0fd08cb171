"""One text from one shared weight: exact, certain, and certain of nothing else."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from dpguard.attacks import span
from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation
from dpguard.attacks.span_evidence import gather
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from tests import messages, tiny

ONE = tiny.SENTENCES[0]
ENCODER = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.in", "mlp.out")
ROUNDABLE = ("attention.query", "attention.key", "mlp.in", "mlp.out")
"""Roles whose smallest singular value stays above bfloat16's rounding in these small random models."""
DECODER = ("attention.qkv", "attention.output", "mlp.in", "mlp.out")
EVERY = [(family, role) for family in tiny.FAMILIES for role in (DECODER if family == "gpt2" else ENCODER)]


def _only(selector: str) -> list[dict]:
    return [{"layers": "all", "share": False}, {"layers": selector, "share": True}]


def _seen(family: str, rows: list[dict], text: str = ONE, **options):
    model = tiny.loaded(family)
    options.setdefault("tell", ())
    seen, batch = messages.observe(model, rows, [text], [1], **options)
    return seen, batch.input_ids[0].tolist()


def _run(seen: Observation, seed: int = 0, **options):
    return span.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(seed), **options)


def _rounded(seen: Observation) -> Observation:
    return replace(seen, message={name: value.bfloat16().float() for name, value in seen.message.items()})


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(("family", "role"), EVERY)
def test_one_weight_gives_the_text_away_without_label_or_length(family: str, role: str, block: int) -> None:
    seen, true = _seen(family, _only(f"block[{block}].{role}.weight"))
    assert len(seen.message) == 1
    found = _run(seen)
    assert found.sequences == [true]
    assert found.certain == [True]
    assert found.notes["weight"] in seen.message


@pytest.mark.parametrize("text", tiny.SENTENCES[1:])
@pytest.mark.parametrize("preset", list(span.PLUGIN.presets))
def test_every_preset_reads_other_texts_too(preset: str, text: str) -> None:
    seen, true = _seen("bert", _only("block[1].attention.query"), text)
    found = _run(seen, preset=preset)
    assert (found.sequences, found.certain) == ([true], [True])


def test_a_word_that_the_tokenizer_cannot_spell_is_found_as_what_it_becomes() -> None:
    seen, true = _seen("bert", _only("block[1].mlp.in"), "please call zzyzx about her card today")
    assert seen.disclosed.tokenizer.unk_token_id in true
    assert _run(seen).sequences == [true]


def test_a_clip_scales_the_gradient_and_hides_nothing() -> None:
    seen, true = _seen("bert", [{"layers": "all", "clip": 1e-3}, {"layers": ["embeddings", "head"], "share": False}])
    found = _run(seen)
    assert (found.sequences, found.certain) == ([true], [True])
    assert found.notes["witnesses"] > 1


def test_the_first_block_needs_no_search() -> None:
    seen, true = _seen("bert", [])
    found = _run(seen)
    assert (found.sequences, found.certain, found.steps) == ([true], [True], 0)
    assert found.candidates < 10
    assert "layer.0" in found.notes["weight"]


@pytest.mark.parametrize("role", ROUNDABLE)
def test_a_message_in_bfloat16_still_gives_the_text_away(role: str) -> None:
    seen, true = _seen("bert", _only(f"block[1].{role}"))
    assert _run(_rounded(seen)).sequences == [true]


def test_noise_far_below_the_signal_is_read_through() -> None:
    rows = [
        {"layers": "all", "share": False},
        {"layers": "block[1].attention.value", "share": True, "clip": 1.0, "noise": 1e-7},
    ]
    seen, true = _seen("bert", rows)
    assert _run(seen).sequences == [true]


def test_noise_above_the_signal_leaves_nothing_and_it_says_so() -> None:
    seen, _ = _seen("bert", [{"layers": "all", "clip": 1.0, "noise": 1.0}])
    found = _run(seen)
    assert (found.sequences, found.certain, found.candidates) == ([], [], 0)
    assert "noise" in found.notes["reason"]


def test_a_space_that_no_text_spans_is_never_certain() -> None:
    """Mixing the inputs' coordinates keeps the rank and the spectrum and makes every text wrong."""
    for seed in range(3):
        seen, _ = _seen("bert", _only("block[1].attention.query.weight"))
        (name, value), *_ = seen.message.items()
        order = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(seed))
        mixed = replace(seen, message={name: value[:, order]})
        found = _run(mixed, budget=Budget(steps=60, candidates=800, restarts=4))
        assert found.certain == [False]
        assert found.notes["residual"] > 1e-4


def test_two_texts_in_one_message_are_not_taken_for_one() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), _only("block[1].mlp.in"), tiny.SENTENCES[:2], [1, 0], tell=())
    assert "first block's MLP" in span.PLUGIN.applicable(seen)
    claimed = replace(seen, disclosed=replace(seen.disclosed, sequences=1))
    assert not any(_run(claimed, budget=Budget(steps=40, candidates=600, restarts=2)).certain)


@pytest.mark.parametrize(
    ("role", "rounding"), [(role, False) for role in ENCODER] + [(role, True) for role in ROUNDABLE]
)
def test_the_certificate_separates_a_text_from_all_its_neighbours(role: str, rounding: bool) -> None:
    seen, true = _seen("bert", _only(f"block[1].{role}"))
    seen = _rounded(seen) if rounding else seen
    with left_as_found(seen.model):
        sites = sites_of(seen.model)
        (evidence,) = gather(seen, [s for s in sites.all if s.name in seen.message], causal=False, most=1)
        probe = Probe(seen.model)
        assert not evidence.contradicts(probe, torch.tensor(true))
        sure, worst = evidence.certifies(probe, torch.tensor(true))
        assert sure or rounding
        for position in range(1, len(true) - 1):
            for token in (5, 20, 40):
                other = list(true)
                other[position] = token if token != true[position] else token + 1
                assert not evidence.certifies(probe, torch.tensor(other))[0]
                assert evidence.certifies(probe, torch.tensor(other))[1] > worst
            other = list(true)
            other[position], other[1 + position % (len(true) - 2)] = (
                other[1 + position % (len(true) - 2)],
                other[position],
            )
            assert other == true or not evidence.certifies(probe, torch.tensor(other))[0]
        assert not evidence.certifies(probe, torch.tensor(true[:-1]))[0]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("sequences", [1, 4, None])
def test_what_the_last_block_and_the_head_hold_is_said(family: str, sequences: int | None) -> None:
    def reason(layer: str) -> str:
        seen, _ = _seen(family, _only(layer))
        return span.PLUGIN.applicable(replace(seen, disclosed=replace(seen.disclosed, sequences=sequences)))

    last, head = reason("block[-1]"), reason("head")
    assert "only the final block's weights are shared, and a classification head reads one state" in last
    assert "query, attention output and MLP have the rank of the texts" in last
    assert "key and value at most heads times that" in last
    assert "one pooled state a text and nothing of its single tokens" in head
    assert "pooled" not in last


@pytest.mark.parametrize("texts", [1, 2])
def test_the_last_blocks_gradients_have_the_ranks_that_the_reason_says(texts: int) -> None:
    model = tiny.loaded("bert", width=64)
    seen, batch = messages.observe(model, [], tiny.SENTENCES[:texts], [0, 1][:texts], tell=())
    heads = model.module.config.num_attention_heads
    assert int(batch.attention_mask.sum()) > heads * texts
    sites = sites_of(model.module)
    for site in (s for s in sites.all if s.block == sites.last_block):
        values = torch.linalg.svdvals(site.oriented(seen.message[site.name]))
        rank = int((values > 1e-5 * values[0]).sum())
        assert rank <= heads * texts if site.role in {"key", "value"} else rank == texts


def test_what_it_cannot_use_it_refuses_with_the_reason() -> None:
    def reason(rows: list[dict], **changes) -> str:
        seen, _ = _seen("bert", rows)
        return span.PLUGIN.applicable(replace(seen, disclosed=replace(seen.disclosed, **changes)))

    assert reason([]) == ""
    assert "no attention or MLP weight" in reason(_only("norms"))
    assert "pruned or rounded" in reason([{"layers": "all", "keep": 0.5}])
    assert "pruned or rounded" in reason([{"layers": "all", "bits": 8}])
    assert reason([], sequences=None) == ""
    assert "first block's MLP output" in reason(_only("block[0].attention.query"), sequences=None, batch_size=2)
    assert reason(_only("block[0].attention.query"), sequences=None) == ""  # the public divisor says one
    assert "query, key or value" in reason(_only("block[0].mlp.out"), sequences=2)
    assert "gradient" in reason([], kind="weights")
    assert reason([], kind="delta") == ""


def test_same_seed_same_answer_and_the_picture_that_is_kept_changes_none() -> None:
    seen, _ = _seen("bert", _only("block[1].mlp.out"))
    first, second = _run(seen, seed=3), _run(seen, seed=3)
    assert first == second


def test_new_weights_get_a_new_picture() -> None:
    model = tiny.loaded("bert", seed=5)
    rows = _only("block[1].attention.query")
    for _ in range(2):
        seen, batch = messages.observe(model, rows, [ONE], [1], tell=())
        assert _run(seen).sequences == [batch.input_ids[0].tolist()]
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_the_budget_is_kept() -> None:
    seen, _ = _seen("bert", _only("block[1].attention.output"), tiny.SENTENCES[2])
    for budget in (Budget(steps=0, candidates=5), Budget(steps=10, candidates=50, restarts=2)):
        found = _run(seen, budget=budget)
        assert found.steps <= budget.steps
        assert found.candidates <= budget.candidates + 2 * budget.restarts + 2


def test_real_sentences_from_the_query_of_a_deep_block(minilm, data_folder) -> None:
    lines = (data_folder / "cola.train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(101).shuffle(rows)
    for row in (rows[2], rows[3], rows[6]):
        seen, batch = messages.observe(
            minilm, _only("block[3].attention.query"), [row["text"]], [row["label"]], tell=()
        )
        found = _run(seen)
        assert found.sequences == [batch.input_ids[0].tolist()]
        assert found.certain == [True]


@pytest.mark.parametrize("role", ["attention.query", "attention.value", "attention.output", "mlp.in"])
@pytest.mark.parametrize("text", ["no no", "no no pain in the arm", "please call her about the card"])
@pytest.mark.parametrize("block", [0, 1])
def test_without_position_embeddings_only_what_shows_is_certified(role: str, text: str, block: int) -> None:
    # a repeated first word has one state, and queries show no first word
    seen, true = _seen("llama", _only(f"block[{block}].{role}.weight"), text)
    found = _run(seen)
    told = len(set(true)) > 1 and role != "attention.query"
    assert found.certain == [told]
    assert found.sequences == [true] or not told


@pytest.mark.parametrize("role", ["attention.value", "mlp.in"])
def test_a_rotary_decoder_is_read_all_the_same(role: str) -> None:
    seen, true = _seen("llama", _only(f"block[1].{role}.weight"), "please call her about the card")
    assert _run(seen).sequences == [true]
