"""Sources of noise: the right law, unpredictable without a seed, reproducible with one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy import stats

from dpguard.engine import noise


def test_pytorchs_cpu_generator_keeps_32_bits_of_a_seed():
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert torch.equal(one, other)  # the reason for SecureSource


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_secure_noise_is_standard_normal_in_the_middle_and_in_the_tail(dtype):
    drawn = noise.SecureSource().normal(400_001, dtype).double()
    assert drawn.shape == (400_001,)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    beyond = int((drawn.abs() > 4).sum())
    expected = 400_001 * 2 * stats.norm.sf(4)
    assert stats.poisson.cdf(beyond, expected) > 1e-6
    assert stats.poisson.sf(beyond - 1, expected) > 1e-6
    half = len(drawn) // 2
    for a, b in (
        (drawn[:-1], drawn[1:]),
        (drawn[:half], drawn[half : 2 * half]),
        (drawn[:half] ** 2, drawn[half:-1] ** 2),
    ):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / math.sqrt(half)


def test_the_extreme_words_stay_finite():
    source = noise.SecureSource()
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        info = torch.iinfo(bits)
        for extreme in (0, 1, -1, info.min, info.max):
            source.words = lambda count, kind, extreme=extreme: torch.full((count,), extreme, dtype=kind)
            assert source.normal(2, dtype).isfinite().all()


def test_uniform_numbers_are_below_one_and_uniform():
    drawn = noise.SecureSource().uniform(200_000)
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-6


def test_no_two_sources_and_no_copy_give_the_same_stream():
    source = noise.SecureSource()
    drawn = [s.normal(8) for s in (source, copy.deepcopy(source), noise.SecureSource(), source)]
    assert len({tuple(d.tolist()) for d in drawn}) == 4


def test_a_seed_is_reproducible_and_none_is_not():
    value = torch.zeros(100_003)
    same = [noise.add_noise_(value.clone(), 0.5, noise.source(3)) for _ in range(2)]
    assert torch.equal(*same)
    other = [noise.add_noise_(value.clone(), 0.5, noise.source(None)) for _ in range(2)]
    assert not torch.equal(*other)
    for drawn in (*same, *other):
        assert abs(float(drawn.std()) - 0.5) < 0.01


def test_a_tensor_that_is_not_contiguous_gets_its_noise_too():
    value = torch.zeros(300, 200).T
    assert abs(float(noise.add_noise_(value, 2.0, noise.source(0)).std()) - 2) < 0.05
