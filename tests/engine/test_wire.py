from __future__ import annotations

import math

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


def test_normalising_brings_every_example_to_nearly_the_bound():
    p = plan({"layers": "all", "clip": 0.7, "mode": "normalise"})
    for scale, least in ((1e-6, 0.0), (1.0, 0.69), (1e4, 0.69999)):
        sums = wire.clip_and_sum(per_example(1, scale), p).sums
        assert least <= norm(sums, p.trained) <= 0.7
    grads = per_example(3)
    by_hand = torch.zeros_like(grads["classifier.weight"][0])
    for i in range(3):
        length = norm({n: g[i] for n, g in grads.items()}, p.trained)
        by_hand += grads["classifier.weight"][i] * 0.7 / (length + 0.01)
    assert torch.allclose(wire.clip_and_sum(grads, p).sums["classifier.weight"], by_hand, rtol=1e-5)


def test_normalising_leaves_a_zero_gradient_at_zero_and_drops_what_is_not_finite():
    p = plan({"layers": "all", "clip": 1.0, "mode": "normalise"})
    grads = per_example(2)
    grads["classifier.bias"][1] = float("inf")
    one = {n: g[:1] * 0 for n, g in grads.items()}
    assert all(not v.any() for v in wire.clip_and_sum(one, p).sums.values())
    assert wire.clip_and_sum(grads, p).dropped == 1
    assert norm(wire.clip_and_sum(grads, p).sums, p.trained) < 1


UPDATE = {"layers": "all", "clip": 0.7, "per": "block", "unit": "update"}


@pytest.mark.parametrize(("scale", "whole"), [(1e-6, False), (10.0, True), (1e15, True)])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_whole_update_is_clipped_once_a_group_after_the_division(scale, whole, size):
    p, grads = plan(UPDATE), per_example(4, scale)
    clipped = wire.clip_and_sum(grads, p)
    assert clipped.norms == {}, "no norm of an example is taken"
    assert torch.allclose(clipped.sums["classifier.weight"], grads["classifier.weight"].sum(0), rtol=1e-4)
    sent = wire.make_message(clipped, p, batch_size=size, generator=torch.Generator()).wire
    for group in p.groups.values():
        length = norm(sent, group.names)
        assert length <= 0.7 * (1 + 1e-6)
        mean = {n: grads[n].double().sum(0) / size for n in group.names}
        assert length == pytest.approx(0.7 if whole else norm(mean, group.names), rel=1e-4)


def test_a_whole_update_can_be_normalised():
    p = plan({**UPDATE, "mode": "normalise"})
    sums = wire.clip_and_sum(per_example(4), p).sums
    for group in p.groups.values():
        length = norm(sums, group.names) / 8
        found = norm(wire.clip_update(sums, p, 8), group.names) / 8
        assert found == pytest.approx(0.7 * length / (length + 0.01), rel=1e-5)


def test_the_noise_of_a_whole_update_has_its_std_on_the_wire():
    p = plan({"layers": "all", "clip": 0.5, "noise": 2.0, "unit": "update"})
    zero = {n: torch.zeros((1, *q.shape)) for n, q in MODEL.named_parameters()}
    sent = message(p, zero, batch_size=16).wire["bert.encoder.layer.0.output.dense.weight"]
    assert sent.std().item() == pytest.approx(1.0, rel=0.03)


def test_a_bad_example_or_a_bad_update_does_not_turn_the_message_into_nan():
    p, grads = plan(UPDATE), per_example(4)
    good = wire.clip_and_sum({n: g[[0, 1, 3]] for n, g in grads.items()}, p).sums
    grads["classifier.bias"][2] = float("nan")
    found = wire.clip_and_sum(grads, p)
    assert found.dropped == 1
    assert all(torch.allclose(v, good[n], atol=1e-5) for n, v in found.sums.items())
    broken = {**found.sums, "classifier.bias": torch.full((2,), float("inf"))}
    update = wire.clip_update(broken, p, 4)
    assert not update["classifier.weight"].any()
    assert not update["classifier.bias"].any()
    assert update["bert.pooler.dense.weight"].any(), "other groups are not touched"


def test_update_groups_leave_other_tensors_alone():
    p = plan({**UPDATE, "layers": "head"})
    sums = wire.clip_and_sum(per_example(4), p).sums
    update = wire.clip_update(sums, p, 4)
    assert all(torch.equal(update[n], sums[n]) for n in sums if not n.startswith("classifier"))
    assert not torch.equal(update["classifier.weight"], sums["classifier.weight"])


ADAPTIVE = {"layers": "all", "clip": {"quantile": 0.5, "rate": 0.2, "count_noise": 1e-9}, "noise": 1.0, "per": "block"}


def after(norms, p, size, steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p = p.with_clips(wire.next_clips(norms, p, generator, batch_size=size))
    return p


def test_one_step_of_an_adaptive_clip_by_hand():
    p = plan({**ADAPTIVE, "clip": {"quantile": 0.25, "start": 2.0, "rate": 0.3, "count_noise": 1e-9}})
    norms = {key: torch.tensor([1.0, 2.0, 3.0]) for key in p.groups}
    # two of three below; four were expected, and the one that is absent counts as half below
    fraction = (0.5 + 0.5 - 0.5) / 4 + 0.5
    for group in after(norms, p, 4).groups.values():
        assert group.clip == pytest.approx(2.0 * math.exp(-0.3 * (fraction - 0.25)))


def test_an_adaptive_clip_settles_at_the_quantile_of_the_norms():
    p = plan({**ADAPTIVE, "clip": {"quantile": 0.8, "start": 50.0, "count_noise": 5}})
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    norms = {key: drawn * (k + 1) for k, key in enumerate(p.groups)}
    for k, group in enumerate(after(norms, p, 2000, steps=200).groups.values()):
        assert group.clip == pytest.approx(0.8 * (k + 1), rel=0.1)


def test_the_noise_on_a_count_has_its_std():
    p = plan({"layers": "all", "clip": {"quantile": 0.5, "rate": 0.01, "count_noise": 7}, "noise": 1.0})
    norms = {"row 1": torch.zeros(0)}
    generator = torch.Generator().manual_seed(0)
    moved = [math.log(wire.next_clips(norms, p, generator, batch_size=10)["row 1"]) / -0.01 * 10 for _ in range(4000)]
    assert torch.tensor(moved).std().item() == pytest.approx(7, rel=0.05)
    assert abs(torch.tensor(moved).mean().item()) < 0.5


def test_one_example_moves_a_count_by_a_half_and_a_dropped_one_by_nothing():
    p = plan(ADAPTIVE)
    base = {key: torch.tensor([0.1, 5.0, 3.0]) for key in p.groups}

    def counts(norms):
        found = after(norms, p, 3).groups.values()
        return torch.tensor([(math.log(g.clip) / -0.2 + 0.5 - 0.5) * 3 for g in found])

    for last in (0.0, 0.2, 1e30):
        more = {key: torch.cat([n, torch.tensor([last])]) for key, n in base.items()}
        assert (counts(more) - counts(base)).abs().max().item() == pytest.approx(0.5, abs=1e-6)
    bad = {key: torch.cat([n, torch.tensor([0.2])]) for key, n in base.items()}
    bad["row 1 head"][-1] = float("nan")
    assert torch.allclose(counts(bad), counts(base), atol=1e-6), "left out of one group means left out of all"


def test_an_adaptive_clip_stays_in_its_range_and_fixed_groups_are_not_named():
    p = plan({"layers": "all", "clip": {"quantile": 0.5, "rate": 1e6, "count_noise": 1e6}, "noise": 1.0},
             {"layers": "head", "clip": 1.0})  # fmt: skip
    norms = {"row 1": torch.zeros(1), "row 2": torch.zeros(1)}
    generator = torch.Generator().manual_seed(0)
    found = [wire.next_clips(norms, p, generator, batch_size=1) for _ in range(20)]
    assert {key for clips in found for key in clips} == {"row 1"}
    assert {clips["row 1"] for clips in found} == set(wire.CLIP_RANGE)


def test_a_clip_follows_the_norms_of_what_was_clipped():
    p = plan(ADAPTIVE)
    small = after(wire.clip_and_sum(per_example(8, 1e-6), p).norms, p, 8)
    large = after(wire.clip_and_sum(per_example(8, 10.0), p).norms, p, 8)
    for key in p.groups:
        assert small.groups[key].clip < 1 < large.groups[key].clip
