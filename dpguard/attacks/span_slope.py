"""Which words the energy's derivative asks for: substitutes that no picture of the states names."""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_sites import Probe

STEEP = 48
"""Words that are tried in a place."""


def steepest(probe: Probe, evidence: Evidence, ids: Tensor, tokens: Tensor, count: int) -> Tensor:
    """(L, count) token ids, those first whose embedding lies most along the descent from the word in the place.

    The energy's first-order change by a substitution (HotFlip, Ebrahimi et al., ACL 2018, arXiv 1712.06751) over the
    distance between the two embeddings: far words have large first-order changes that say nothing.

    Args:
        probe: the model.
        evidence: what has to be explained.
        ids: (L,) the text.
        tokens: (n,) tokens that a text can contain.
        count: how many a place.
    """
    table = probe.embedding[tokens]
    here = probe.embedding[ids]
    x = here[None].clone().requires_grad_(True)
    energy, _ = evidence.energy(probe.relaxed(evidence.site.layer, x))
    (slope,) = torch.autograd.grad(energy.sum(), x)
    change = slope[0] @ table.T - (slope[0] * here).sum(1, keepdim=True)
    gain = change / torch.cdist(here, table).clamp_min(1e-6)
    return tokens[gain.topk(min(count, len(tokens)), dim=1, largest=False).indices]
