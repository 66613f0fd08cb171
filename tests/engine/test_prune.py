"""Which entries magnitude pruning keeps: the largest, exactly as many as the table says."""

from __future__ import annotations

import math

import pytest
import torch

from dpguard.engine.release import prune


def _kept(flat: torch.Tensor, keep: float) -> torch.Tensor:
    return prune.apply(flat, (keep, "magnitude"), name="w", mask_seed=0)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("filled", [1.0, 0.6, 0.3, 0.02, 0.0])
def test_the_largest_are_kept_and_no_more(keep: float, filled: float) -> None:
    source = torch.Generator().manual_seed(3)
    value = torch.randn(50, 200, generator=source) * (torch.rand(50, 200, generator=source) < filled)
    sent = _kept(value, keep)
    count = max(1, math.ceil(keep * value.numel()))
    chosen = sent != 0
    assert int(chosen.sum()) == min(count, int((value != 0).sum()))
    torch.testing.assert_close(sent[chosen], value[chosen], rtol=0, atol=0)
    if filled:
        assert float(sent[chosen].abs().min()) >= float(value[~chosen].abs().max())


@pytest.mark.parametrize(("keep", "size"), [(0.07, 100), (0.14, 50), (0.29, 100), (0.55, 1000), (1.1e-7, 10**9)])
def test_a_share_that_is_a_whole_number_of_entries_sends_no_more(keep: float, size: int) -> None:
    """.07 of 100 is 7.000000000000001 in floats."""
    assert prune.entries(keep, size) == round(keep * size)
    if size <= 1000:
        for method in ("magnitude", "random"):
            sent = prune.apply(torch.ones(size), (keep, method), name="w", mask_seed=0)
            assert int(sent.sum()) == round(keep * size)


def test_a_share_that_is_no_whole_number_is_rounded_up() -> None:
    asked = {(0.071, 100): 8, (0.3, 3): 1, (0.4, 3): 2, (1e-9, 10): 1}
    assert {at: prune.entries(*at) for at in asked} == asked


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1, 0.01])
def test_among_equal_entries_there_are_still_no_more(keep: float) -> None:
    value = torch.randint(-2, 3, (1000,), generator=torch.Generator().manual_seed(5)).float()
    sent = _kept(value, keep)
    assert int((sent != 0).sum()) == min(math.ceil(keep * 1000), int((value != 0).sum()))
    assert float(sent.abs().max()) == 2
