"""Mixed precision as training loops use it: the forward pass in bfloat16, clip, sum and noise never."""

from __future__ import annotations

import pytest
import torch

from dpguard.engine import clipping
from dpguard.engine.gradients import per_example_losses, running_as
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_loops import DP, made

CLIP = 0.05
ROWS = [{"layers": "all", "clip": CLIP, "per": "block"}]
MODES = ("fast", "loop", "opacus")


def collected(family, mode, *, everywhere, rows=slice(None), dtype=torch.bfloat16):
    """The clipped sum of a batch, with autocast around the forward pass or around everything."""
    model = tiny.module(family)
    batch = batch_of(family, rows)
    with running_as(model, "eval"):
        attached = clipping.attach(model, Policy(ROWS).plan(slots(model)), loss_reduction="sum", grad_mode=mode)
        try:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                losses = per_example_losses(model, batch)
                if everywhere:
                    losses.sum().backward()
                    return attached.collect()
            losses.sum().backward()
            return attached.collect()
        finally:
            attached.detach()


def batch_of(family, rows=slice(None)):
    texts, labels = list(tiny.SENTENCES)[rows], [0, 1, 1][rows]
    return collate(texts, labels, tiny.tokenizer(family == "gpt2"))


def whole(message):
    return torch.cat([value.flatten() for value in message.sums.values()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_under_autocast_every_example_stays_within_its_clip_and_sums_are_float32(family, mode):
    for everywhere in (False, True):
        for row in range(3):
            one = collected(family, mode, everywhere=everywhere, rows=slice(row, row + 1))
            assert {value.dtype for value in one.sums.values()} == {torch.float32}
            groups = [[n for n in one.sums if f".{b}." in n] for b in range(3)]
            for names in groups:
                assert names
                norm = torch.cat([one.sums[n].flatten() for n in names]).double().norm()
                assert CLIP * 0.999 < norm < CLIP * (1 + 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_the_gradient_by_its_rounding_and_the_sum_around_it_by_nothing(mode):
    inside, outside = (whole(collected("bert", mode, everywhere=e)) for e in (True, False))
    exact = whole(collected("bert", mode, everywhere=False, dtype=None))
    assert 1e-5 < float((outside - exact).norm() / exact.norm()) < 0.05  # bfloat16 was used, and rounds to 2^-9
    assert float((inside - outside).norm() / outside.norm()) < 1e-6


def test_a_training_loop_may_step_inside_autocast():
    messages = []
    for everywhere in (False, True):
        torch.manual_seed(0)  # of dropout
        engine, module, optimizer, loader = made(rows=DP, loss_reduction="sum", batch_size=4, seed=3)
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(**batch).loss
                if everywhere:
                    loss.backward()
                    optimizer.step()
            if not everywhere:
                loss.backward()
                optimizer.step()
            messages.append({name: value.clone() for name, value in optimizer.last_message.items()})
            optimizer.zero_grad()
        assert engine.steps == len(loader)
    half = len(messages) // 2
    assert half > 1
    for one, two in zip(messages[:half], messages[half:], strict=True):
        assert one.keys() == two.keys()
        assert all(value.dtype == torch.float32 for value in one.values())
        assert all(torch.allclose(value, two[name], rtol=1e-4, atol=1e-6) for name, value in one.items())


def test_a_mean_in_16_bits_is_still_refused():
    _, module, _, loader = made(rows=DP, batch_size=4, seed=3)
    batch = next(iter(loader))
    assert len(batch["labels"])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="loss_reduction='sum'"):
        module(**batch)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused_before_anything_leaves(unscale):
    """It would scale every example past its clip."""
    engine, module, optimizer, loader = made(rows=DP, loss_reduction="sum", batch_size=4, seed=3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(module(**next(iter(loader))).loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(UserError, match="with bfloat16, which needs no scale"):
        scaler.step(optimizer)
    assert engine.steps == 0
    assert not optimizer.last_message
