"""A candidate's likelihood from inputs and output gradients, against gradients written out one by one."""

from __future__ import annotations

import copy

import pytest
import torch

from dpguard.attacks.likelihood_channels import channels
from dpguard.attacks.likelihood_replay import Replay
from dpguard.attacks.observation import Observation
from dpguard.engine import wire
from dpguard.engine.gradients import gradient
from dpguard.inputs.batch import collate
from tests import messages, tiny

POLICIES = {
    "flat": [{"layers": "all", "clip": 0.1, "noise": 0.3}],
    "per tensor": [{"layers": "all", "clip": 0.01, "noise": 0.5, "per": "tensor"}],
    "loose": [{"layers": "all", "clip": 1e4, "noise": 1e-5}],
    "withheld": [{"layers": "all", "clip": 0.1, "noise": 0.3}, {"layers": "embeddings", "share": False}],
    "normalise": [{"layers": "all", "clip": 0.1, "noise": 0.3, "mode": "normalise", "per": "block"}],
    "update": [{"layers": "all", "clip": 0.1, "noise": 0.3, "unit": "update"}],
    "pruned": [{"layers": "all", "clip": 0.1, "noise": 0.3, "keep": 0.1}],
    "pruned to few": [{"layers": "all", "clip": 0.1, "noise": 0.3, "keep": 0.02}],
    "4 bits": [{"layers": "all", "clip": 0.1, "noise": 0.3, "bits": 4}],
    "no clip": [{"layers": "all", "noise_std": 0.01}],
    "one matrix": [
        {"layers": "all", "train": False, "share": False},
        {"layers": "block[1].mlp.in.weight", "train": True, "share": True, "clip": 0.01, "noise": 1.0},
    ],
}
TEXTS = (*tiny.SENTENCES, "no", "the the the test the test")


def _by_hand(seen: Observation, model, batch) -> torch.Tensor:
    """-||m - g||² / 2 s² + ||m||² / 2 s² summed over tensors, g as the client would clip it."""
    plan, out = seen.disclosed.plan, []
    for row in range(len(batch)):
        alone = batch.rows(slice(row, row + 1))
        full = gradient(model, alone, plan.trained)
        sums = wire.clip_and_sum({n: g[None] for n, g in full.items()}, plan).sums
        sums = wire.clip_update(sums, plan, seen.disclosed.batch_size)
        total = 0.0
        for c in channels(seen)[0]:
            g = sums[c.name].double() * (1 if c.kept is None else c.kept)
            value = c.value.double()
            total += float(value.pow(2).sum() - (value - g).pow(2).sum()) / (2 * c.variance)
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


def _case(family: str, policy: str):
    loaded = tiny.loaded(family, width=16, blocks=2)
    seen, _ = messages.observe(loaded, POLICIES[policy], tiny.SENTENCES[:1], (1,))
    double = copy.deepcopy(loaded.module).double()
    batch = collate(TEXTS, (1, 0, 1, 0, 1), loaded.tokenizer)
    return seen, double, batch


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama", "llama-lora"])
def test_the_likelihood_is_that_of_gradients_written_out(family: str, policy: str) -> None:
    if policy == "one matrix" and family == "llama-lora":
        pytest.skip("LoRA freezes it")
    seen, double, batch = _case(family, policy)
    replay = Replay(seen, dtype=torch.float64)
    found, expected = replay.terms(batch).loglik, _by_hand(seen, double, batch)
    assert not replay.ignored
    # Llama's norms compute in float32 whatever the model is
    tolerance = 1e-5 if family.startswith("llama") else 1e-10
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert float(expected.std()) > 1e-3 * float(expected.abs().max())  # candidates do differ


@pytest.mark.parametrize("policy", ["pruned", "pruned to few"])
def test_pruned_tensors_cost_no_gradient_as_large_as_the_table(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few entries no weight gradient is formed, and all candidates go through at once."""
    seen, _, batch = _case("bert", policy)
    replay, formed = Replay(seen), []
    whole = Replay._form
    monkeypatch.setattr(Replay, "_form", lambda self, name, use: formed.append(name) or whole(self, name, use))
    replay.terms(batch)
    assert not any("embeddings" in name and name.endswith("_embeddings.weight") for name in formed)
    matrices = {c.name for c in replay.channels if c.value.dim() == 2}
    assert bool(matrices & set(formed)) == (policy == "pruned")
    assert replay.chunk == (4 if policy == "pruned" else 64)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama"])
def test_from_embeddings_it_is_the_same_and_has_the_right_derivative(family: str) -> None:
    seen, _, batch = _case(family, "flat")
    plan = [{"layers": "all", "clip": 0.1, "noise": 0.3}, {"layers": "embeddings", "train": False}]
    seen, _ = messages.observe(tiny.loaded(family, width=16, blocks=2), plan, tiny.SENTENCES[:1], (1,))
    replay = Replay(seen, dtype=torch.float64)
    batch = batch.rows(slice(0, 1))
    table = replay.model.get_input_embeddings().weight
    start = table[batch.input_ids].clone().requires_grad_()
    value = replay.differentiable(batch, start).loglik
    assert torch.allclose(value.detach(), replay.terms(batch).loglik, rtol=1e-5)
    (slope,) = torch.autograd.grad(value.sum(), start)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-4 * direction / direction.norm()
    with torch.no_grad():
        ends = [replay.differentiable(batch, start.detach() + side * step).loglik for side in (1, -1)]
    assert float((slope * step).sum()) == pytest.approx(float((ends[0] - ends[1]) / 2), rel=2e-2)


def test_unknown_release_operations_are_left_out_and_clean_tensors_weigh_the_same() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:1], (1,))
    found, ignored = channels(seen)
    assert all(c.clean for c in found)
    energies = [float(c.value.pow(2).sum()) / c.variance for c in found]
    assert energies == pytest.approx([1e4] * len(found), rel=1e-4)
    assert ignored
    assert all(".key.bias" in name for name in ignored)
