"""Where a spectrum itself shows its rank: a wide gap below what rounding could reach at worst.

The bound on rounding errors (`span_rank`) has to hold for every model, and is far above what most messages have.
The errors' own singular values lie close together, those of a batch's inputs do not: one far above the next,
with the errors' even slope behind, is an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.span_rank import SPARE, Span

GAP = 8.0
"""Ratio of neighbouring singular values that rounding errors do not show (measured: at most 1.4)."""
REACH = 24
"""How many singular values below the bound are looked at."""


def by_gap(gradient: Tensor, span: Span) -> Span:
    """The span with the directions that lie between the bound on rounding and a gap in the spectrum.

    Args:
        gradient: (outputs, inputs) float64.
        span: of that gradient; one of a noisy or coarsely rounded message comes back as it is.
    """
    if span.blurred or span.drifted:
        return span
    values, directions = torch.linalg.svd(gradient, full_matrices=False)[1:]
    first = span.rank - 1
    last = min(span.rank + REACH, len(values) - 4 * SPARE)
    if last <= first + 1:
        return span
    ratios = values[first : last - 1] / values[first + 1 : last].clamp_min(1e-300)
    gaps = (ratios > GAP).nonzero().flatten().tolist()
    if not gaps or not gaps[-1]:
        return span
    rank = first + gaps[-1] + 1
    tail = float(values[rank:].pow(2).sum()) / max(1, gradient.shape[0] - rank)
    return Span(directions[:rank], values[:rank], tail, span.inputs)
