"""Continuous search: move token embeddings until the states they cause lie in the span and fill it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_sites import Probe

RATE = 0.03
DECAY, DECAY_EVERY = 0.89, 25
SETTLED = 1e-3
"""Mean residual at which the best restart needs no more steps."""


def relax(
    probe: Probe,
    evidence: Evidence,
    start: Tensor,
    fixed: Tensor,
    *,
    steps: int,
) -> tuple[Tensor, int]:
    """Descend from several starts side by side on the energy plus a norm regulariser.

    Args:
        probe: the model.
        evidence: what has to be explained.
        start: (restarts, L, d) embeddings.
        fixed: (L,) bool, positions whose embedding stays.
        steps: at most this many Adam steps.

    Returns:
        (restarts, L, d) embeddings, best start first, and the steps taken.
    """
    norm = probe.embedding.norm(dim=1).mean()
    unit = float(norm) / start.shape[2] ** 0.5
    x = start.clone().requires_grad_(True)
    free = (~fixed).float()[None, :, None]
    optimiser = torch.optim.Adam([x], lr=RATE * max(1.0, unit / 0.06))
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, DECAY_EVERY, DECAY)
    energy = torch.zeros(len(x))
    taken = 0
    for _ in range(steps):
        energy, rows = evidence.energy(probe.relaxed(evidence.site.layer, x, rough=True))
        drift = (x.norm(dim=2).mean(1) / norm - 1).pow(2)
        x.grad = torch.autograd.grad((energy + drift).sum(), x)[0] * free
        optimiser.step()
        schedule.step()
        taken += 1
        if float(rows.detach().mean(1).min()) < SETTLED:
            break
    order = energy.detach().argsort()
    return x.detach()[order], taken
