from __future__ import annotations

import pytest
import torch

from dpguard.engine import wire
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny

MODEL = tiny.module("bert")
SLOTS = slots(MODEL)


def plan(*rows):
    return Policy(list(rows)).plan(SLOTS)


def per_example(count, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn((count, *p.shape), generator=g) for n, p in MODEL.named_parameters()}


def norm(sums, names):
    return torch.cat([sums[n].flatten().double() for n in names]).norm().item()


@pytest.mark.parametrize("per", ["row", "block", "role", "tensor"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_one_example_moves_no_group_beyond_its_clip(per, scale):
    p = plan({"layers": "all", "clip": 0.7, "per": per}, {"layers": "head", "clip": 0.1})
    grads = per_example(5, scale)
    full = wire.clip_and_sum(grads, p)
    fewer = wire.clip_and_sum({n: g[:-1] for n, g in grads.items()}, p)
    for group in p.groups.values():
        moved = norm({n: full.sums[n].double() - fewer.sums[n].double() for n in group.names}, group.names)
        assert moved <= group.clip * (1 + 1e-5)
        if scale >= 1:
            assert moved == pytest.approx(group.clip, rel=1e-4), "large gradients use the whole bound"


def test_small_gradients_are_not_touched():
    grads = per_example(3, 1e-6)
    found = wire.clip_and_sum(grads, plan({"layers": "all", "clip": 10.0}))
    for name, value in found.sums.items():
        assert torch.allclose(value, grads[name].sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_one_non_finite_example_is_dropped_from_every_group_and_counted(bad):
    p = plan({"layers": "all", "clip": 1.0, "per": "block"})
    grads = per_example(4)
    clean = wire.clip_and_sum({n: g[[0, 1, 3]] for n, g in grads.items()}, p)
    grads["classifier.bias"][2] = bad
    found = wire.clip_and_sum(grads, p)
    assert found.dropped == 1
    for name, value in found.sums.items():
        assert torch.allclose(value, clean.sums[name], atol=1e-6), name


def test_no_examples_give_zeros():
    found = wire.clip_and_sum(per_example(0), plan({"layers": "all", "clip": 1.0}))
    assert all(not v.any() for v in found.sums.values())
    assert found.sums["classifier.bias"].shape == (2,)


def test_missing_or_uneven_gradients_are_an_error():
    p, grads = plan({"layers": "all", "clip": 1.0}), per_example(3)
    grads["bert.embeddings.position_embeddings.weight"] = grads["bert.embeddings.position_embeddings.weight"][:1]
    with pytest.raises(ValueError, match="batch sizes differ"):
        wire.clip_and_sum(grads, p)
    del grads["classifier.bias"]
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        wire.clip_and_sum(grads, p)


def message(p, grads, seed=0, batch_size=4, mask_seed=0):
    generator = torch.Generator().manual_seed(seed)
    return wire.make_message(
        wire.clip_and_sum(grads, p), p, batch_size=batch_size, generator=generator, mask_seed=mask_seed
    )


def test_noise_has_the_std_of_its_rule_on_every_tensor_zeros_included():
    p = plan(
        {"layers": "all", "clip": 0.5, "noise": 2.0},
        {"layers": "block[1]", "noise": 0.5},
        {"layers": "pooler", "clip": 3.0},
    )
    zero = {n: torch.zeros((1, *q.shape)) for n, q in MODEL.named_parameters()}
    draws = [message(p, zero, seed).noised for seed in range(60)]
    for name, claimed in (
        ("classifier.weight", 1.0),
        ("bert.encoder.layer.1.output.dense.weight", 0.25),
        ("bert.pooler.dense.weight", 6.0),
    ):
        values = torch.stack([d[name] for d in draws]).double()
        assert values.std().item() == pytest.approx(claimed, rel=0.1 if values.numel() < 20_000 else 0.02)
        assert values.std(0).min() > claimed / 3, "every coordinate is noised"


def test_layers_get_independent_noise():
    p = plan({"layers": "all", "clip": 1.0, "noise": 1.0})
    zero = {n: torch.zeros((1, *q.shape)) for n, q in MODEL.named_parameters()}
    noised = message(p, zero).noised
    a, b = noised["bert.encoder.layer.0.output.dense.weight"], noised["bert.encoder.layer.1.output.dense.weight"]
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.05


def test_noise_std_is_in_wire_units():
    p = plan({"layers": "all", "noise_std": 0.3})
    zero = {n: torch.zeros((1, *q.shape)) for n, q in MODEL.named_parameters()}
    sent = message(p, zero, batch_size=8).wire["bert.encoder.layer.0.output.dense.weight"]
    assert sent.std().item() == pytest.approx(0.3, rel=0.03)


def test_the_divisor_is_public():
    p, grads = plan({"layers": "all", "clip": 1.0}), per_example(3)
    assert torch.allclose(
        message(p, grads, batch_size=8).wire["classifier.weight"] * 8,
        wire.clip_and_sum(grads, p).sums["classifier.weight"],
    )


def test_only_shared_tensors_leave():
    p = plan(
        {"layers": "all", "clip": 1.0, "noise": 1.0},
        {"layers": "embeddings", "share": False},
        {"layers": "block[0]", "train": False},
    )
    found = message(p, per_example(2))
    assert set(found.wire) == set(p.shared)
    assert set(found.noised) == set(p.trained)
    assert not any("embeddings" in n or "layer.0." in n for n in found.wire)


@pytest.mark.parametrize(("keep", "size"), [(0.1, 13), (0.001, 1), (0.5, 64)])
def test_keep_is_chosen_after_noise_per_tensor(keep, size):
    base = {"layers": "all", "clip": 1.0, "noise": 1.0}
    grads = per_example(2)
    whole, pruned = message(plan(base), grads).wire, message(plan({**base, "keep": keep}), grads).wire
    name = "classifier.weight"  # 2 x 64
    kept = pruned[name] != 0
    assert int(kept.sum()) == size
    assert torch.equal(pruned[name][kept], whole[name][kept])
    assert whole[name][kept].abs().min() >= whole[name][~kept].abs().max()


def test_random_masks_come_from_a_public_seed_and_not_from_the_data():
    p = plan({"layers": "all", "keep": 0.25, "prune": "random"})
    masks = [
        message(p, per_example(2, seed=s), seed=s, mask_seed=5).wire["bert.pooler.dense.weight"] != 0 for s in (1, 2)
    ]
    other = message(p, per_example(2), mask_seed=6).wire["bert.pooler.dense.weight"] != 0
    assert torch.equal(*masks)
    assert int(masks[0].sum()) == 64 * 64 // 4
    assert not torch.equal(masks[0], other)


@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (2, 3), (4, 15), (8, 255)])
def test_bits(bits, levels):
    grads = per_example(1)
    grads["bert.pooler.dense.weight"][0, 0, :5] = 0
    whole = message(plan({"layers": "all", "keep": 1.0}), grads).wire["bert.pooler.dense.weight"]
    sent = message(plan({"layers": "all", "bits": bits}), grads).wire["bert.pooler.dense.weight"]
    assert len(torch.unique(sent[sent != 0].abs())) <= (levels + 1) // 2
    assert sent.abs().max() == pytest.approx(whole.abs().max().item())
    assert not sent[0, :5].any(), "zero stays zero"
    if bits == 8:
        assert (sent - whole).abs().max() <= whole.abs().max() / 127 / 2 * 1.001


def test_the_same_seed_gives_the_same_message():
    p, grads = plan({"layers": "all", "clip": 1.0, "noise": 1.0, "keep": 0.5, "bits": 4}), per_example(2)
    one, two, other = message(p, grads, 3).wire, message(p, grads, 3).wire, message(p, grads, 4).wire
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
