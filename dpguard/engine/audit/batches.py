"""Made-up per-example gradients that look for the edges of a clipping mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dpguard.policy.table import Plan

KINDS = (
    "normal",
    "x 1e4",
    "aligned",
    "x 1e-3",
    "one example x 1e6",
    "one example NaN",
    "one entry infinite",
    "near-ties",
)
"""normal: norms around twice the clip; near-ties: all entries of the sum equal to one part in a million."""

PerExample = dict[str, Tensor]
_SCALE = {"x 1e4": 2e4, "x 1e-3": 2e-3}


def make(plan: Plan, kind: str, rows: int, seed: int) -> PerExample:
    """One batch.

    Args:
        plan: gradients are scaled so that a group's norm is around its clip times the scale of the kind.
        kind: one of `KINDS`.
        rows: number of examples, 0 included.
        seed: of the draw.

    Returns:
        trained parameter name -> (rows, *shape) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {key: sum(rule.slot.size for rule in group.rules) for key, group in plan.groups.items()}
    out = {}
    for name in plan.trained:
        rule = plan[name]
        unit = (rule.clip or 1.0) / math.sqrt(sizes.get(rule.group, rule.slot.size))
        draw = torch.randn((rows, *rule.slot.shape), generator=generator, dtype=torch.float64)
        if kind == "aligned":
            draw = torch.full_like(draw, 3.0)
        elif kind == "near-ties":
            draw = 3.0 + 1e-6 * draw
        else:
            draw = draw * _SCALE.get(kind, 2.0)
            if rule.slot.role.endswith("embedding"):
                # rows of tokens that no example has: the sum is exactly zero there
                draw = draw * (torch.rand((rule.slot.shape[0],), generator=generator) < 0.4).reshape(-1, 1)
        out[name] = draw * unit
    return _spoil(out, kind, rows)


def _spoil(batch: PerExample, kind: str, rows: int) -> PerExample:
    if not rows:
        return batch
    if kind == "one example x 1e6":
        for value in batch.values():
            value[0] *= 1e6
    if kind == "one example NaN":
        for value in batch.values():
            value[0] = math.nan
    if kind == "one entry infinite":
        next(iter(batch.values()))[0].flatten()[0] = math.inf
    return batch


def without(batch: Mapping[str, Tensor], index: int) -> PerExample:
    """The batch without one example."""
    return {name: torch.cat([g[:index], g[index + 1 :]]) for name, g in batch.items()}


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> PerExample:
    """The examples of both batches."""
    return {name: torch.cat([g, second[name]]) for name, g in first.items()}


def nothing(batch: Mapping[str, Tensor]) -> PerExample:
    """The empty batch of the same tensors."""
    return {name: g[:0] for name, g in batch.items()}
