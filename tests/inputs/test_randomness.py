"""A caller's random numbers go on where they were, on every device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dpguard.inputs.randomness import devices_of, seeded
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


def test_the_same_numbers_from_a_seed_and_the_callers_own_afterwards():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(5, [CPU]):
        drawn = torch.rand(4)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), drawn)


class Recorded:
    """What was asked of CUDA, on a machine that may have none."""

    def __init__(self, monkeypatch, devices=3):
        self.forked, self.seeds = [], {}
        real = torch.random.fork_rng

        def fork(found):
            self.forked.append(list(found))
            return real([])

        def generator(index):
            return SimpleNamespace(manual_seed=lambda seed: self.seeds.update({index: seed}))

        def all_of_them(_seed):
            raise AssertionError("every device was seeded, and not every one is put back")

        monkeypatch.setattr(torch.random, "fork_rng", fork)
        monkeypatch.setattr(torch.cuda, "default_generators", tuple(map(generator, range(devices))))
        monkeypatch.setattr(torch.cuda, "manual_seed_all", all_of_them)


def test_just_the_models_cuda_devices_are_seeded_and_put_back(monkeypatch):
    asked = Recorded(monkeypatch)
    with seeded(5, [CPU, CUDA, torch.device("cuda", 2), CUDA]):
        pass
    assert asked.forked == [[1, 2]]
    assert asked.seeds == {1: 5, 2: 5}


def test_devices_of_a_model():
    assert devices_of(tiny.module("bert")) == {CPU}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_device():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.manual_seed(3)
    expected = torch.rand(2, device=device)
    torch.cuda.manual_seed(3)
    with seeded(5, [device]):
        torch.rand(9, device=device)
    assert torch.equal(torch.rand(2, device=device), expected)
    torch.cuda.manual_seed(3)
    with seeded(5):
        torch.rand(9)
    assert torch.equal(torch.rand(2, device=device), expected), "nor touched where no tensor of it is concerned"
