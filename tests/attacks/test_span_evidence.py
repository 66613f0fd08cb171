"""What one weight says against a text, and what it does not know."""

from __future__ import annotations

import torch

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_rank import span_of
from dpguard.attacks.span_sites import Site


class _Fixed:
    """A probe of one text, whose states are given."""

    def __init__(self, states: torch.Tensor) -> None:
        self.known = states

    def states(self, layer: object, ids: torch.Tensor) -> torch.Tensor:
        return self.known[None, : ids.shape[1]]


def _nearly_one_direction(signal: float) -> tuple[Evidence, _Fixed]:
    """Six inputs, two of them nearly the same, and the evidence of their gradient.

    Args:
        signal: size of the sixth input's gradient: a small one hides what it adds to the fifth.
    """
    rng = torch.Generator().manual_seed(3)
    rows = torch.linalg.qr(torch.randn((64, 7), generator=rng, dtype=torch.float64)).Q.T
    inputs = torch.cat([rows[:5], (rows[4] + 3e-3 * rows[5])[None]])
    signals = torch.randn((128, 6), generator=rng, dtype=torch.float64)
    signals[:, 5] *= signal
    found = span_of((signals @ inputs).float().double())
    layer = torch.nn.Linear(64, 128)
    return Evidence(Site("w", "mlp_in", 0, layer, False), found, causal=False), _Fixed(inputs)


def test_a_true_input_below_the_edge_of_the_rank_speaks_against_no_text() -> None:
    evidence, probe = _nearly_one_direction(signal=1e-5)
    ids = torch.arange(6)
    assert evidence.span.rank == 5
    assert evidence.contradicts(probe, ids)  # by the first-order figure alone
    assert not evidence.contradicts(probe, ids, tokens=6)
    probe.known[2] = torch.roll(probe.known[2], 1)  # a wrong one does
    assert evidence.contradicts(probe, ids, tokens=6)


def test_a_span_of_all_inputs_is_held_against_texts_strictly() -> None:
    evidence, probe = _nearly_one_direction(signal=1.0)
    ids = torch.arange(6)
    assert evidence.span.rank == 6
    assert not evidence.contradicts(probe, ids, tokens=6)
    probe.known[2] += 0.005 * torch.roll(probe.known[2], 1)  # far less than the resolution
    assert evidence.contradicts(probe, ids, tokens=6)
