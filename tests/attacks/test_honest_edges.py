"""Where an attack could look weaker or stronger than it is: unknown words, pruned noise, momentum, counts, labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpguard.attacks import guesses, panel, vocabulary
from dpguard.attacks.rows import _read
from dpguard.engine.local import LocalTraining
from dpguard.errors import UserError
from dpguard.inputs import texts
from dpguard.inputs.family import slots
from dpguard.inputs.texts import Example
from dpguard.measure import kappa, metrics
from dpguard.measure.leakage import judge, observation
from dpguard.measure.truth import Truth
from dpguard.policy.table import Policy
from tests import messages, tiny
from tests.attacks.test_prior import PUBLIC


def _odd(model, text="the nurse called zzzz today"):
    seen, batch = messages.observe(model, [], [text], [1], tell=(), public=PUBLIC)
    assert model.tokenizer.unk_token_id in batch.input_ids[0].tolist()
    return seen, batch.input_ids[0].tolist(), text


@pytest.mark.parametrize("name", ["rows", "span"])
def test_a_word_that_the_vocabulary_lacks_is_read_and_counted(name) -> None:
    model = tiny.loaded("bert")
    seen, true, text = _odd(model)
    outcome = panel.run_panel(seen, (name,), 0)[-1]
    assert (outcome.reconstruction.sequences, outcome.reconstruction.certain) == ([true], [True])
    [score] = judge(outcome, Truth.of([Example(text, 1)], model.tokenizer), [0], model.tokenizer)
    assert (score.metrics["exact_match"], score.metrics["token_recall"], score.metrics["rougeL"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("keep", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("prune", ["magnitude", "random"])
def test_rows_of_pruned_noise_are_not_taken_for_words(keep, prune) -> None:
    """On a table of pure noise, the expected number of rows that pass is .01; before, one in four did."""
    model = tiny.loaded("bert")
    rows = [{"layers": "all", "clip": 1e-6, "noise": 1e6, "keep": keep, "prune": prune}]
    passed = 0
    for seed in range(5):
        seen, _ = messages.observe(model, rows, ["the nurse called"], [1], seed=seed)
        passed += len(_read(seen, "token_embedding").rows)
    assert passed <= 2


def test_a_words_row_passes_through_pruned_noise() -> None:
    model = tiny.loaded("bert")
    rows = [{"layers": "all", "clip": 1.0, "noise": 1e-4, "keep": 0.2}]
    seen, batch = messages.observe(model, rows, ["the nurse called"], [1])
    found = set(_read(seen, "token_embedding").rows.tolist())
    assert set(batch.input_ids[0].tolist()) <= found
    assert len(found) <= batch.input_ids.shape[1] + 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_noise_of_a_change_after_steps_with_momentum_is_known(momentum) -> None:
    model = tiny.loaded("bert")
    plan = Policy([{"layers": "all", "clip": 1e-6, "noise": 1e6}]).plan(slots(model.module))
    from dpguard.engine.client import Client
    from dpguard.inputs.batch import collate

    training = LocalTraining("sgd", 0.1, momentum)
    batch = collate(["the nurse called"], [1], model.tokenizer)
    update = Client(model.module, plan, seed=1, batch_size=1, training=training).observe([batch] * 4)
    seen = observation(model, plan, update)
    name = "bert.embeddings.word_embeddings.weight"
    assert float(update.tensors[name].std()) == pytest.approx(seen.noise_std(name), rel=0.03)


def test_noise_behind_adams_steps_is_of_unknown_size_and_not_none() -> None:
    seen, _ = messages.observe(
        tiny.loaded("bert", width=16, blocks=1), [{"layers": "all", "clip": 1.0, "noise": 1.0}], ["yes"], [1]
    )
    told = replace(seen.disclosed, kind="delta", learning_rate=None)
    assert seen.noise_std(next(iter(seen.message))) == 1.0
    assert replace(seen, disclosed=told).noise_std(next(iter(seen.message))) == math.inf
    assert replace(seen, disclosed=replace(told, learning_rate=0.1)).noise_std(next(iter(seen.message))) == 0.1


def test_public_texts_without_a_word_are_a_reason_to_skip_and_no_crash() -> None:
    seen, _ = messages.observe(tiny.loaded("bert", width=16, blocks=1), [], ["yes"], [1], public=("\u200b",), tell=())
    likelihood = panel.attack("likelihood:quick")
    told = replace(seen.disclosed, tokenizer=_Wordless(seen.disclosed.tokenizer))
    assert "public texts" in likelihood.applicable(replace(seen, disclosed=told))
    assert likelihood.applicable(replace(seen, disclosed=replace(seen.disclosed, public_texts=("yes",)))) == ""


def test_labels_of_many_classes_are_drawn_and_not_cut_off() -> None:
    seen = messages.observe(tiny.loaded("bert", labels=10), [], ["yes"], [1], tell=())[0]
    found = guesses.label_guesses(seen, 8, torch.Generator().manual_seed(0))
    assert len(found) == len(set(found)) == guesses.HYPOTHESES
    assert {label for labels in found for label in labels} == set(range(10))
    assert any(0 not in labels for labels in found)
    few = messages.observe(tiny.loaded("bert", labels=3), [], ["yes"], [1], tell=())[0]
    assert len(guesses.label_guesses(few, 2, torch.Generator())) == 6


@pytest.mark.parametrize("know", [(), ("count",)])
def test_the_floor_has_a_guess_for_every_clients_text(know) -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], ["yes"], [1], tell=(), public=PUBLIC)
    told = replace(seen.disclosed, clients=4, sequences=4 if know else None)
    found = panel.attack("prior").reconstruct(replace(seen, disclosed=told))
    assert len(found.sequences) == 4


def test_public_texts_longer_than_the_model_reads_are_no_candidates() -> None:
    model = tiny.loaded("bert")
    long = " ".join(["ward"] * (model.max_tokens + 5))
    for public in ((*PUBLIC[:20], long), (long, long + " ward")):
        seen, _ = messages.observe(
            model, [{"layers": "all", "clip": 0.1, "noise": 0.1}], ["the nurse called"], [1], public=public
        )
        found = panel.attack("likelihood:quick").reconstruct(seen)
        assert len(found.sequences) == 1


def test_a_bag_of_all_words_recovers_no_more_than_its_first_ones() -> None:
    assert metrics.token_recall([9, 8, 1, 2, 3], [1, 2, 3]) == pytest.approx(1 / 3)
    assert metrics.token_recall([3, 1, 2], [1, 2, 3]) == 1.0


def test_entities_without_words_are_no_entities() -> None:
    assert metrics.entity_recall("", ["***", ""]) is None
    assert metrics.entity_recall("the ward", ["***", "ward"]) == 1.0


class _Wordless:
    """The tokenizer around it, but that it makes nothing of any list of texts."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, given, **options):
        return {"input_ids": [[] for _ in given]} if isinstance(given, list) else self.inner(given, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class _Silent:
    """A tokenizer that, as BERT's does of a zero-width space, makes nothing of a text."""

    def __call__(self, given):
        return {"input_ids": [[2, 3] for _ in given]}

    def num_special_tokens_to_add(self):
        return 2


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"own.jsonl:1: a text that the tokenizer makes no token of"):
        texts.check_lengths([Example("\u200b", 0, where="own.jsonl:1")], _Silent(), 64)


def test_proposals_are_framed_once() -> None:
    tokenizer = tiny.tokenizer()
    whole = tokenizer("the nurse called")["input_ids"]
    assert vocabulary.framed(tokenizer, whole, 64) == whole
    assert (
        vocabulary.framed(tokenizer, tokenizer("the nurse called", add_special_tokens=False)["input_ids"], 64) == whole
    )
    assert len(vocabulary.framed(tokenizer, whole * 9, 12)) == 12
    assert vocabulary.framed(tokenizer, whole[:1], 64) == []


def test_a_guesser_who_knows_lengths_is_no_worse() -> None:
    blind, told = (kappa.measure(tuple(PUBLIC), tiny.tokenizer(), lengths) for lengths in (False, True))
    assert all(told[name].upper >= blind[name].upper for name in kappa.METRICS)
    assert told["rougeL"].texts == len(PUBLIC)
