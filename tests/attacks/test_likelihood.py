"""The likelihood attack: right candidates, honest certainty, reasons where it can't score."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch

from dpguard.attacks import panel
from dpguard.attacks.base import Budget
from dpguard.attacks.likelihood_prior import Neighbours
from tests import messages, tiny

DP = [{"layers": "all", "clip": 0.5, "noise": 0.01}]
QUIET = [{"layers": "all", "clip": 0.1, "noise": 0.002}]
CANDIDATES = (
    *tiny.SENTENCES,
    "the doctor asked about his new card",
    "no money was sent today",
    "thank you for help with her left leg",
    "the ward is not ready yet",
    "yes",
)


def _seen(family="bert", policy=(), text=0, **options):
    seen, batch = messages.observe(tiny.loaded(family), list(policy), [tiny.SENTENCES[text]], (1,), **options)
    return seen, batch.input_ids[0].tolist()


def _closed(seen, candidates=CANDIDATES, order=0):
    mixed = random.Random(order).sample(candidates, len(candidates))
    return replace(seen, disclosed=replace(seen.disclosed, candidates=mixed))


def _run(seen, seed=0, budget=None):
    return panel.attack("likelihood").reconstruct(seen, seed=seed, budget=budget)


@pytest.mark.parametrize("tell", [("labels", "lengths"), ()])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama", "llama-lora"])
def test_closed_world_finds_the_text_and_says_how_sure_it_is(family, tell) -> None:
    seen, true = _seen(family, DP, tell=tell)
    found = _run(_closed(seen))
    assert found.sequences == [true]
    assert found.certain == [True]
    assert found.notes["posterior"] > 1 - 1e-6
    assert abs(found.notes["misfit"]) < 5
    assert found.notes["label"] == 1


@pytest.mark.parametrize(
    "column",
    [{}, {"keep": 0.1}, {"keep": 0.2, "prune": "random"}, {"bits": 4}, {"bits": 1}, {"keep": 0.1, "bits": 1}],
    ids=str,
)
@pytest.mark.parametrize("policy", [[{"layers": "all"}], DP], ids=["clean", "noise"])
def test_pruning_and_rounding_hide_nothing_and_only_exact_likelihoods_prove(policy, column) -> None:
    """Where a tenth of the noised entries arrives some draws mislead, others on another processor: of 24 each on one of
    them 23 were right, and 21 with one bit."""
    named = []
    for text, seed in product(range(3), range(2 if policy is DP else 1)):
        seen, true = _seen("bert", [{**policy[0], **column}] if policy is DP or column else [], text, seed=seed)
        found = _run(_closed(seen))
        named.append(found.sequences == [true])
        if "bits" in column:
            assert found.certain == [False]
    assert named.count(False) <= (2 if policy is DP and column.get("keep") == 0.1 else 0)


def test_success_under_heavy_noise_is_that_of_the_exact_likelihood() -> None:
    """Among 8 candidates, on the same draws, against gradients written out; and far from always right."""
    from dpguard.engine import wire
    from dpguard.engine.gradients import gradient
    from dpguard.inputs.batch import collate

    model, right, sure = tiny.loaded("bert"), 0, 0
    policy = [{"layers": "all", "clip": 0.3, "noise": 0.6}]
    for seed in range(12):
        target = CANDIDATES[seed % len(CANDIDATES)]
        seen, batch = messages.observe(model, policy, [target], (0,), seed=seed, tell=("labels",))
        found = _run(_closed(seen, order=seed))
        plan, scores = seen.disclosed.plan, []
        for text in CANDIDATES:
            one = gradient(model.module, collate([text], [0], model.tokenizer), plan.trained)
            sums = wire.clip_and_sum({n: g[None] for n, g in one.items()}, plan).sums
            scores.append(-sum(float((seen.message[n] - g).double().pow(2).sum()) for n, g in sums.items()))
        best = CANDIDATES[max(range(len(scores)), key=scores.__getitem__)]
        assert found.sequences[0] == model.tokenizer(best)["input_ids"]
        right += found.sequences[0] == batch.input_ids[0].tolist()
        sure += found.certain[0]
        logits = torch.tensor(scores, dtype=torch.float64) / (2 * (0.3 * 0.6) ** 2)
        assert found.notes["posterior"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-3)
    assert right < 12
    assert sure == 0


@pytest.mark.parametrize(
    "policy", [[], DP, [{"layers": "all", "clip": 0.5, "noise": 0.3}]], ids=["clean", "low", "high"]
)
@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_it_is_never_certain_of_a_message_without_a_text(policy, spoil) -> None:
    for seed in range(8):
        seen, _ = _seen("bert", policy, seed % 3)
        assert _run(_closed(spoil(seen, seed=seed))).certain == [False]


@pytest.mark.parametrize("policy", [[], DP], ids=["clean", "noise"])
def test_it_is_not_certain_when_the_text_is_not_among_the_candidates(policy) -> None:
    for text in range(3):
        seen, _ = _seen("bert", policy, text)
        others = tuple(c for c in CANDIDATES if c != tiny.SENTENCES[text])
        assert _run(_closed(seen, others)).certain == [False]


def test_candidates_beyond_the_budget_are_counted_and_leave_it_uncertain() -> None:
    seen, true = _seen("bert", DP, tell=("labels",))
    found = _run(_closed(seen, (tiny.SENTENCES[0], *CANDIDATES[1:4]), order=3), budget=Budget(0, 3))
    assert found.notes["unscored"] == 1
    assert found.candidates == 3
    assert found.certain == [False]
    assert true  # the text itself may be the one that was not scored


@pytest.mark.parametrize("policy", [[], QUIET], ids=["clean", "noise"])
@pytest.mark.parametrize("tell", [("labels", "lengths"), pytest.param((), marks=pytest.mark.slow)])
def test_open_world_reads_a_sentence_that_no_public_text_holds(policy, tell) -> None:
    text = 0 if tell else 1
    public = [c for c in CANDIDATES if c != tiny.SENTENCES[text]] + ["no ward today now"]
    seen, true = _seen("bert", policy, text, public=public, tell=tell)
    budget = Budget(0, 6000 if tell else 12000)
    found = _run(seen, budget=budget)
    assert found.sequences == [true]
    assert found.certain == [not policy]  # under noise a text that was never scored may be likelier
    assert found.candidates <= budget.candidates
    assert found.notes["label"] == 1


def test_open_world_finds_what_is_at_least_as_likely_as_the_truth_under_noise() -> None:
    """Where the noise hides words, the search must not be what fails: likelihood times prior, against the truth's."""
    from dpguard.attacks.likelihood_replay import Replay
    from dpguard.attacks.likelihood_texts import score

    seen, true = _seen("bert", [{"layers": "all", "clip": 0.1, "noise": 0.1}], 1, public=(*CANDIDATES, "the ward"))
    found = _run(seen, budget=Budget(0, 5000))
    words = Neighbours(seen.disclosed, seen.model.config.vocab_size, 512)
    posterior = float(score(Replay(seen), [true], 1, 0).loglik[0]) + words.log_prior([true])[0]
    assert found.notes["log_posterior"] >= posterior - 1e-3 * abs(posterior)


@pytest.mark.parametrize(("noise", "searches"), [(0.1, True), (0.5, False)])
def test_a_message_that_tells_next_to_nothing_is_read_by_public_texts_alone(noise: float, searches: bool) -> None:
    """Energy of a text under an active clip: 1 / noise², 100 and 4 nats."""
    seen, _ = _seen("bert", [{"layers": "all", "clip": 0.1, "noise": noise}], 1, public=CANDIDATES)
    found = _run(seen, budget=Budget(0, 3000))
    assert found.sequences[0]
    assert (found.candidates > 1000) == searches


@pytest.mark.parametrize("candidates", [1, 5, 40])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_any_budget_gives_one_text(family, candidates) -> None:
    seen, _ = _seen(family, DP, 0, public=CANDIDATES[1:], tell=())
    found = _run(seen, budget=Budget(0, candidates))
    assert len(found.sequences) == 1
    assert found.sequences[0]
    assert found.candidates <= candidates


@pytest.mark.parametrize("change", [{}, {"seed": 1}])
def test_the_open_world_is_decided_by_the_seed(change) -> None:
    seen, _ = _seen("bert", DP, 0, public=CANDIDATES[1:])
    first = _run(seen, budget=Budget(0, 300))
    second = _run(seen, budget=Budget(0, 300), **change)
    assert (first.sequences == second.sequences and first.notes == second.notes) == (not change)


@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
def test_open_world_is_never_certain_of_a_message_without_a_text(spoil) -> None:
    for seed in range(3):
        seen, _ = _seen("bert", [], seed, public=CANDIDATES)
        assert _run(spoil(seen, seed=seed), budget=Budget(0, 400)).certain == [False]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "delta"}, "delta"),
        ({"kind": "aggregate"}, "aggregate"),
        ({"sequences": 3}, "several texts"),
        ({"sequences": None, "batch_size": 4}, "several texts"),
        ({"public_texts": ()}, "neither candidates"),
    ],
)
def test_it_says_what_it_can_not_score(change, word) -> None:
    seen, _ = _seen("bert", DP, public=CANDIDATES[1:])
    assert panel.attack("likelihood").applicable(seen) == ""
    assert word in panel.attack("likelihood").applicable(replace(seen, disclosed=replace(seen.disclosed, **change)))


def test_it_declines_language_models_and_unknown_release_operations() -> None:
    from dpguard.policy.table import Plan

    seen, _ = _seen("bert", DP, public=CANDIDATES[1:])
    plan = seen.disclosed.plan
    strange = Plan({n: replace(r, release=(("strange", 1),)) for n, r in plan.items()}, plan.rows)
    told = replace(seen.disclosed, plan=strange)
    assert "release" in panel.attack("likelihood").applicable(replace(seen, disclosed=told))
    causal = tiny.loaded("gpt2-lm")
    assert "predicts tokens" in panel.attack("likelihood").applicable(replace(seen, model=causal.module))


def test_a_search_s_table_of_neighbours_goes_with_it() -> None:
    """Rows of a large vocabulary are large; a cycle would keep those of one target after another."""
    seen, _ = messages.observe(tiny.loaded("bert"), [], ["the nurse called"], [1], public=["the nurse wrote", "yes"])
    words = Neighbours(seen.disclosed, seen.model.config.vocab_size, 512)
    words.between(1, 2)
    gone = weakref.ref(words)
    gc.disable()
    try:
        del words
        assert gone() is None
    finally:
        gc.enable()
