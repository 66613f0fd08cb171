"""Inputs at the edge of what floats, processes and checkpoints can do: a claim must hold there too, or be refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from dpguard.engine import noise, wire
from dpguard.engine.client import Client
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_opacus_traps import EXAMPLES, collator, private, train_step

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]


def halves(batch, cut):
    return [{key: value[part] for key, value in batch.items()} for part in (slice(0, cut), slice(cut, 2 * cut))]


@pytest.mark.parametrize("mode", ["fast", "opacus", "loop"])
def test_two_halves_in_one_backward_pass_are_never_clipped_as_one(mode):
    _engine, module, optimizer, loader = private(DP, grad_mode=mode, batch_size=8, poisson_sampling=False)
    batch = next(iter(loader))
    one, two = halves(batch, 4)
    (module(**one).loss + module(**two).loss).backward()
    with pytest.raises(UserError, match="4 examples went backward for a batch of 8: one that counts twice, or two"):
        optimizer.step()


def test_a_part_that_was_given_up_is_left_out_and_the_others_count():
    _engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False, max_physical_batch_size=2)
    parts = iter(loader)
    for given_up in (False, True, False):
        module(**next(parts)).loss.backward()
        if given_up:
            optimizer.zero_grad()
        else:
            optimizer.step()
    assert optimizer.stepped


def test_a_sampler_of_several_passes_is_refused():
    sampler = RandomSampler(EXAMPLES, num_samples=2 * len(EXAMPLES))
    loader = DataLoader(EXAMPLES, batch_size=6, sampler=sampler, collate_fn=collator)
    model = tiny.module("bert").train()
    with pytest.raises(UserError, match="may draw an example twice"):
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            policy=Policy(DP), poisson_sampling=False,
        )  # fmt: skip


def test_a_batch_may_be_fetched_while_the_model_is_still_evaluated():
    engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False)
    for count, batch in enumerate(loader):
        module.train()
        train_step(module, optimizer, batch)
        module.eval()
        with torch.no_grad():
            module(**collator(EXAMPLES[:3]))
        if count == 2:
            break
    assert engine.steps == 3


def test_an_evaluation_between_the_parts_of_a_batch_loses_none_of_them():
    _engine, module, optimizer, loader = private(DP, batch_size=6, poisson_sampling=False, max_physical_batch_size=3)
    parts = iter(loader)
    module(**next(parts)).loss.backward()
    optimizer.step()
    module.eval()
    with torch.no_grad():
        for batch in loader:
            module(**batch)
    module.train()
    module(**next(parts)).loss.backward()
    optimizer.step()
    assert optimizer.stepped


def test_an_engine_counts_one_training():
    engine, module, optimizer, loader = private(DP)
    train_step(module, optimizer, next(iter(loader)))
    engine.close()
    with pytest.raises(UserError, match="has made 1 steps under its policy already; expected an engine of its own"):
        engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(EXAMPLES, batch_size=6, collate_fn=collator), policy=Policy(DP),
        )  # fmt: skip


@pytest.mark.parametrize(("other", "sentence"), [
    ({"poisson_sampling": False}, "made with poisson_sampling, this training is without"),
    ({"seed": None}, "made with a seed, this training is without"),
])  # fmt: skip
def test_a_checkpoint_of_other_sampling_or_noise_changes_nothing(other, sentence):
    engine, module, optimizer, loader = private(DP, seed=3)
    train_step(module, optimizer, next(iter(loader)))
    resumed = private(DP, **{"seed": 3, **other})[0]
    with pytest.raises(UserError, match=sentence):
        resumed.load_state_dict(engine.state_dict())
    assert resumed.steps == 0


def test_a_client_never_tells_how_many_texts_were_drawn():
    model = tiny.module("bert")
    plan = Policy(DP).plan(slots(model))
    with pytest.raises(UserError, match="the number of rows that were drawn is private"):
        Client(model, plan, sampling_rate=0.1)
    sizes = {Client(model, plan, sampling_rate=0.1, batch_size=4, seed=0).observe(collator(EXAMPLES[:n])).batch_size
             for n in (0, 1, 3)}  # fmt: skip
    assert sizes == {4}


@pytest.mark.parametrize("mode", ["clip", "normalise"])
def test_an_example_whose_norm_overflows_is_left_out(mode):
    """Squares of 2.25e38 are floats, and their sum is not."""
    plan = Policy([{"layers": "all", "clip": 1.0, "noise": 1.0, "mode": mode}]).plan(slots(tiny.module("bert")))
    grads = {name: torch.zeros(2, *plan[name].slot.shape) for name in plan.trained}
    for name in list(plan.trained)[:2]:
        grads[name].view(2, -1)[0, 0] = 1.5e19
        grads[name].view(2, -1)[1, 0] = 3.0
    clipped = wire.clip_and_sum(grads, plan)
    assert clipped.dropped == 1
    total = torch.stack([s.double().norm() for s in clipped.sums.values()]).norm()
    assert 0.9 < float(total) <= 1.0 + 1e-6


def _sixteen(dtype):
    return copy.deepcopy(tiny.module("bert")).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", ["example", "update"])
def test_messages_of_16_bit_models_are_noised_in_32(dtype, unit):
    """In 16 bits one entry in twenty got no noise, and an empty batch could be told by its type."""
    model = _sixteen(dtype)
    plan = Policy([{"layers": "all", "clip": 1.0, "noise": 1.0, "unit": unit}]).plan(slots(model))
    empty = Batch.of(collator(EXAMPLES[:0]))
    for batch in (empty, [empty, empty]):
        update = Client(model, plan, batch_size=4).observe(batch)
        assert {t.dtype for t in update.tensors.values()} == {torch.float32}
        entries = torch.cat([t.flatten() for t in update.tensors.values()])
        assert bool(entries.isfinite().all())
        if unit == "update" or batch is empty:  # else the weights' own rounding comes after the noise
            assert float((entries == 0).float().mean()) < 1e-4
    with pytest.raises(TypeError, match="expected float32 or float64"):
        noise.add_noise_(torch.zeros(3, dtype=dtype), 1.0, noise.source(None))


def test_a_forked_process_draws_other_noise():
    code = (
        "import os, torch\nfrom dpguard.engine import noise\n"
        "source = noise.source(None); source.normal(3)\nread, write = os.pipe()\n"
        "if os.fork() == 0:\n    os.write(write, repr(source.normal(4).tolist()).encode()); os._exit(0)\n"
        "os.wait(); theirs = os.read(read, 999).decode(); ours = repr(source.normal(4).tolist())\n"
        "print(len(eval(theirs)), theirs == ours)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]
