"""The combined answer is chosen by certainty, then by what explains the message, and by nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.attacks import combined
from dpguard.attacks.combined import PLUGIN
from dpguard.attacks.observation import Reconstruction
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.measure.leakage import observation
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from tests import tiny

TRUTH = ["the nurse called about her test result", "card is not blocked"]
NEAR = ["the nurse called about her new result", "card is not lost"]
FAR = ["two bank card money", "yes please help with pain"]


def _seen(rows=(), texts=1, family="bert", **threat):
    model = tiny.loaded(family)
    plan = Policy(list(rows)).plan(slots(model.module))
    options = Threat(**threat)
    each = texts // options.clients
    batches = [collate(TRUTH[i : i + each], [1, 0][i : i + each], model.tokenizer) for i in range(0, texts, each)]
    update = options.message(model, plan, batches, noise_seed=1)
    return model, observation(model, plan, update, sequences=texts)


def _offer(model, texts, sure=False):
    ids = [list(model.tokenizer(text)["input_ids"]) for text in texts]
    return Reconstruction(ids, [sure] * len(ids))


def _chosen(model, seen, offers):
    seen = replace(seen, earlier=tuple(offers.items()))
    return PLUGIN.reconstruct(seen, rng=torch.Generator()).notes["attack"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"layers": "all", "clip": 0.1, "noise": 0.02}],
        [{"layers": "all", "keep": 0.1}],
        [{"layers": "all", "bits": 1}],
        [{"layers": "embeddings", "share": False}],
    ],
)
@pytest.mark.parametrize("texts", [1, 2])
def test_the_answer_that_explains_the_message_wins(rows, texts) -> None:
    model, seen = _seen(rows, texts)
    offers = {name: _offer(model, side[:texts]) for name, side in (("a", FAR), ("b", TRUTH), ("c", NEAR))}
    assert _chosen(model, seen, offers) == "b"
    del offers["b"]
    assert _chosen(model, seen, offers) == "c"


@pytest.mark.parametrize("threat", [{"local_steps": 3, "learning_rate": 1e-3}, {"clients": 2}])
def test_updates_and_means_of_clients_are_ranked_too(threat) -> None:
    model, seen = _seen(texts=2, **threat)
    offers = {name: _offer(model, side) for name, side in (("a", FAR), ("b", TRUTH), ("c", NEAR))}
    assert _chosen(model, seen, offers) == "b"


def test_a_certain_answer_goes_first() -> None:
    model, seen = _seen()
    offers = {"a": _offer(model, TRUTH[:1]), "b": _offer(model, NEAR[:1], sure=True)}
    assert _chosen(model, seen, offers) == "b"


def test_it_needs_an_answer_that_was_read_off_the_message() -> None:
    model, seen = _seen()
    assert PLUGIN.applicable(seen)
    assert PLUGIN.applicable(replace(seen, earlier=(("prior", _offer(model, FAR[:1])),)))
    assert not PLUGIN.applicable(replace(seen, earlier=(("match:demo", _offer(model, FAR[:1])),)))


def test_a_message_that_nobody_could_read_counts_with_the_guess() -> None:
    """Skipped there, its mean would be over the messages that were easy to read."""
    model, seen = _seen()
    offers = {"prior": _offer(model, FAR[:1]), "span": Reconstruction([], [])}
    assert PLUGIN.applicable(replace(seen, earlier=tuple(offers.items()))) == ""
    assert _chosen(model, seen, offers) == "prior"
    nothing = replace(seen, earlier=(("span", Reconstruction([], [])),))
    assert PLUGIN.reconstruct(nothing, rng=torch.Generator()).sequences == []


def test_certain_of_some_texts_is_not_certain_of_all() -> None:
    model, seen = _seen(texts=2)
    offers = {"a": _offer(model, TRUTH[:1], sure=True), "b": _offer(model, TRUTH)}
    assert _chosen(model, seen, offers) == "b"


def test_answers_with_missing_or_odd_texts_are_ranked_last_not_refused() -> None:
    model, seen = _seen(texts=2)
    odd = Reconstruction([[2, 3], []], [False, False])
    long = Reconstruction([[7] * 500], [False])
    assert _chosen(model, seen, {"a": odd, "b": _offer(model, TRUTH), "c": long}) == "b"


def test_disclosed_labels_are_the_batchs_in_any_order() -> None:
    model, seen = _seen(texts=2)
    seen = replace(seen, disclosed=replace(seen.disclosed, labels=(1, 0)))
    for side in (TRUTH, TRUTH[::-1]):
        offers = (("near", _offer(model, NEAR)), ("truth", _offer(model, side)))
        found = PLUGIN.reconstruct(replace(seen, earlier=offers), rng=torch.Generator())
        assert found.notes["attack"] == "truth"
        assert found.notes["correlation"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "row", [{"clip": 1e-3, "per": "tensor", "unit": "update"}, {"clip": 1e-3, "per": "tensor"}, {"bits": 1}]
)
@pytest.mark.parametrize("texts", [1, 2])
def test_the_truth_replays_to_what_was_seen(row, texts) -> None:
    model, seen = _seen([{"layers": "all", **row}], texts)
    seen = replace(seen, earlier=(("a", _offer(model, TRUTH[:texts])),))
    found = PLUGIN.reconstruct(seen, rng=torch.Generator())
    assert found.notes["correlation"] == pytest.approx(1, abs=1e-3)


def test_gradients_of_many_texts_and_classes_are_held_within_bounds(monkeypatch) -> None:
    _, seen = _seen(texts=2)
    monkeypatch.setattr(combined, "HELD", 8_000)
    entries = sum(target.numel() for target in combined._Judge.of(seen).targets.values())
    assert 0 < entries * 2 * 2 <= 8_000
