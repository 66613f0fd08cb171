"""What a client may know about its own training and nobody else: clipped fractions, signal to noise, bad examples.

Every number here is computed from private gradients without noise. It never enters an `Update`, and a report that
shows it is outside every epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpguard.policy.table import Plan

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class GroupDiagnostics:
    """One clip group so far.

    Attributes:
        clip: the bound of the latest step.
        examples: how many per-example norms were seen.
        over: how many of them were above the bound.
        signal_to_noise: L2 norm of the latest clipped sum / expected L2 norm of its noise; inf without noise.
    """

    clip: float
    examples: int = 0
    over: int = 0
    signal_to_noise: float = math.inf

    @property
    def clipped_fraction(self) -> float:
        """Share of the examples above the bound; nan before any."""
        return self.over / self.examples if self.examples else math.nan


class Diagnostics:
    """Per clip group and overall; stays with the client."""

    def __init__(self) -> None:
        self.groups: dict[str, GroupDiagnostics] = {}
        self.dropped = 0
        self.steps = 0

    def __repr__(self) -> str:
        return f"Diagnostics({self.steps} steps, {self.dropped} examples dropped)\n{self.to_frame()}"

    def record(
        self, norms: Mapping[str, Tensor], sums: Mapping[str, Tensor], dropped: int, plan: Plan, batch_size: int
    ) -> None:
        """Take in one step before its noise.

        Args:
            norms: clip group -> (B,) norms before clipping.
            sums: trained name -> clipped sum.
            dropped: examples left out.
            plan: the policy with the bounds in force.
            batch_size: the public batch size.
        """
        self.steps += 1
        self.dropped += dropped
        for key, group in plan.groups.items():
            seen = self.groups.setdefault(key, GroupDiagnostics(group.clip))
            seen.clip = group.clip
            if key in norms:
                seen.examples += len(norms[key])
                seen.over += int((norms[key] > group.clip).sum())
            signal = math.hypot(*(float(torch.linalg.vector_norm(sums[name])) for name in group.names))
            noise = math.sqrt(sum(rule.std(batch_size) ** 2 * rule.slot.size for rule in group.rules))
            seen.signal_to_noise = signal / noise if noise else math.inf

    @property
    def clipped_fraction(self) -> float | None:
        """Share of (example, group) pairs above their bound; None where nothing is clipped."""
        examples = sum(g.examples for g in self.groups.values())
        return sum(g.over for g in self.groups.values()) / examples if examples else None

    def to_frame(self) -> pd.DataFrame:
        """One row a clip group: clip, clipped_fraction, signal_to_noise."""
        import pandas as pd

        rows = [
            {"group": key, "clip": g.clip, "clipped_fraction": g.clipped_fraction, "signal_to_noise": g.signal_to_noise}
            for key, g in self.groups.items()
        ]
        return pd.DataFrame(rows, columns=["group", "clip", "clipped_fraction", "signal_to_noise"])
