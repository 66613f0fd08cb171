"""Clips fitted on public texts: the share asked for is clipped, everything else of the plan stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml

from dpguard.engine import gradients
from dpguard.engine.accounting import guarantee
from dpguard.engine.fit_clips import ROUNDING, _round_up, fit, group_norms
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny

TEXTS = [
    " ".join(tiny.WORDS[(7 * i) % 30 : (7 * i) % 30 + 2 + i % 6]) + f" {tiny.WORDS[40 + i % 20]}" for i in range(43)
]
FACTS = {"sampling_rate": 0.02, "steps": 200, "delta": 1e-5}


@pytest.fixture(scope="module")
def model():
    return tiny.module("bert")


def batches(size=16):
    parts = [range(start, min(start + size, len(TEXTS))) for start in range(0, len(TEXTS), size)]
    return [collate([TEXTS[i] for i in part], [i % 2 for i in part], tiny.tokenizer()) for part in parts]


@pytest.fixture(scope="module")
def texts():
    return batches()


@pytest.mark.parametrize("per", ["row", "block", "role", "tensor"])
@pytest.mark.parametrize("grad_mode", ["fast", "loop"])
def test_norms_are_those_of_one_text_at_a_time(model, texts, per, grad_mode):
    plan = Policy([{"layers": "all", "clip": 1e-3, "per": per}]).plan(slots(model))
    found = group_norms(model, plan, texts[:1], grad_mode=grad_mode)
    assert list(found) == list(plan.groups)
    for index in (0, 5):
        with gradients.running_as(model, "eval"):
            grads = gradients.gradient(model, texts[0].rows(slice(index, index + 1)), plan.trained)
        for key, group in plan.groups.items():
            wanted = torch.cat([grads[name].double().flatten() for name in group.names]).norm()
            assert found[key][index] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("per", ["row", "block", "role"])
def test_the_asked_share_is_clipped(model, texts, per, quantile):
    fitted = fit(Policy([{"layers": "all", "clip": 1.0, "per": per}]), model, texts, quantile=quantile)
    assert fitted.examples == len(TEXTS)
    assert fitted.dropped == 0
    for group in fitted.groups:
        at = np.sort(group.norms)[math.ceil(quantile * len(TEXTS)) - 1]
        assert at <= group.clip <= at * 1.01 + 1e-12, "rounded upwards to three digits"
        # what the rounding itself lets through is not what the quantile missed
        between = ((group.norms > at) & (group.norms <= group.clip)).mean()
        assert abs(group.above + between - (1 - quantile)) <= 1 / len(TEXTS)


def test_the_fitted_plan_clips_what_the_table_says(model, texts):
    """The fitted policy is measured afresh: its own groups, its own norms."""
    fitted = fit(Policy([{"layers": "all", "clip": 1.0, "per": "block"}]), model, texts, quantile=0.7)
    plan = fitted.policy.plan(slots(model))
    norms = group_norms(model, plan, texts)
    assert [group.above for group in fitted.groups] == [(norms[k] > g.clip).mean() for k, g in plan.groups.items()]


ROWS = [
    {"layers": "all", "clip": 1.0, "per": "block", "noise": 0.8, "keep": 0.5},
    {"layers": "block[0].mlp", "noise": 1.5},
    {"layers": "head", "clip": 2.0, "noise": 3.0},
]


def test_the_guarantee_does_not_change(model, texts):
    before = Policy(ROWS)
    after = fit(before, model, texts).policy
    plans = [policy.plan(slots(model)) for policy in (before, after)]
    assert plans[0].hash != plans[1].hash
    claims = [guarantee(plan, **FACTS) for plan in plans]
    assert claims[0].sigma_eff == claims[1].sigma_eff
    assert claims[0].epsilon == claims[1].epsilon < math.inf


def test_it_reads_back_from_yaml(model, texts, tmp_path):
    fitted = fit(Policy(ROWS, "mine"), model, texts).policy
    path = tmp_path / "fitted.yaml"
    path.write_text(yaml.safe_dump({"name": fitted.name, "rows": [dict(row) for row in fitted.rows]}))
    assert Policy.load(path).plan(slots(model)).hash == fitted.plan(slots(model)).hash


def test_deterministic_and_independent_of_the_batches_and_nothing_is_touched(model, texts):
    policy = Policy(ROWS)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, again = fit(policy, model, texts), fit(policy, model, iter(texts))
    assert first.policy.rows == again.policy.rows
    other = fit(policy, model, batches(7))
    for one, two in zip(first.groups, other.groups, strict=True):
        assert one.clip == pytest.approx(two.clip, rel=0.011)
    assert list(policy.rows) == ROWS
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not model.training


def test_dropout_is_off(texts):
    noisy = tiny.module("bert", hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4)
    still = tiny.module("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plan = Policy([{"layers": "all", "clip": 1.0}]).plan(slots(noisy))
    assert np.array_equal(*(group_norms(m, plan, texts)["row 1"] for m in (noisy, still)))


def test_a_group_without_gradient_keeps_its_clip_and_says_so(model, texts):
    policy = Policy([{"layers": "all", "clip": 0.25, "per": "tensor", "noise": 1.0}])
    fitted = fit(policy, model, texts)
    kept = {group.layers: group for group in fitted.groups if group.kept}
    assert {layers for layers in kept if "attention.key.bias" in layers[0]} == set(kept)
    assert len(kept) == 3
    assert all(group.clip == group.before == 0.25 and "zero" in group.kept for group in kept.values())
    assert all(group.norms.max() < ROUNDING for group in kept.values())


def test_adaptive_clips_are_left_alone(model, texts):
    adaptive = {"layers": "block[0]", "clip": {"quantile": 0.5, "start": 0.3}, "per": "role"}
    fitted = fit(Policy([{"layers": "all", "clip": 1.0, "per": "block"}, adaptive]), model, texts)
    assert fitted.policy.rows[-1] == adaptive
    assert {group.kept for group in fitted.groups if group.id.startswith("row 2")} == {
        "the clip follows its own quantile by noised counts"
    }
    assert not any(group.kept for group in fitted.groups if group.id.startswith("row 1"))


def test_texts_that_are_not_finite_are_left_out_and_counted(model, texts, monkeypatch):
    """One unusual word makes a text's gradient infinite; the others of its batch count all the same."""
    bad = tiny.module("bert")
    word = int(tiny.tokenizer()(TEXTS[3])["input_ids"][1])
    with torch.no_grad():
        bad.bert.embeddings.word_embeddings.weight[word] = float("inf")
    hit = sum(word in tiny.tokenizer()(text)["input_ids"] for text in TEXTS)
    assert 0 < hit < len(TEXTS)
    fitted = fit(Policy([{"layers": "all", "clip": 1.0, "per": "block"}]), bad, texts)
    assert (fitted.examples, fitted.dropped) == (len(TEXTS) - hit, hit)
    assert all(len(group.norms) == len(TEXTS) - hit and np.isfinite(group.norms).all() for group in fitted.groups)


@pytest.mark.parametrize("family", ["gpt2-lm", "llama-lm"])
def test_next_token_models(family):
    model = tiny.module(family)
    plain = collate(TEXTS[:8], [0] * 8, tiny.tokenizer(True))
    batch = type(plain)(plain.input_ids, plain.attention_mask, plain.input_ids)
    fitted = fit(Policy([{"layers": "all", "clip": 1.0, "per": "block"}]), model, [batch], quantile=0.25)
    assert all(group.above == pytest.approx(0.75, abs=0.13) for group in fitted.groups)


@pytest.mark.parametrize("value", [0.1234, 0.123, 1.0, 9.991, 1.5e-7, 123456.0])
def test_rounding_never_goes_below(value):
    found = _round_up(value)
    assert value <= found <= value * 1.01
    assert float(f"{found:.3g}") == found


@pytest.mark.parametrize(
    ("rows", "quantile", "sentence"),
    [
        ([{"layers": "all", "clip": 1.0}], 0, "quantile is 0; expected a number above 0 and below 1"),
        ([{"layers": "all", "clip": 1.0}], 1.0, "quantile is 1.0"),
        ([{"layers": "all", "clip": 1.0}], "half", "quantile is 'half'"),
        ([], 0.5, "'mine' has no clip, so there is nothing to fit"),
        ([{"layers": "all", "keep": 0.1}], 0.5, "nothing to fit"),
        ([{"layers": "all", "clip": {"quantile": 0.5}}], 0.5, "follows its own quantile"),
        ([{"layers": "all", "clip": 1.0, "unit": "update"}], 0.5, "unit: example"),
        ([{"layers": "all", "train": False}, {"layers": "head", "clip": 1.0, "train": True}], 0.5, "no public texts"),
    ],
)
def test_mistakes(model, rows, quantile, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(Policy(rows, "mine"), model, [], quantile=quantile)


def test_only_bad_texts(texts):
    bad = tiny.module("bert")
    with torch.no_grad():
        bad.classifier.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="none of the 43 public texts has a finite gradient"):
        fit(Policy([{"layers": "all", "clip": 1.0}]), bad, texts)
