"""The plug of an attack: one file, one `PLUGIN`, one row of capabilities; the harness judges and counts.

An attack module assigns `PLUGIN`, an object that satisfies `Attack`. It proposes, it never scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dpguard.attacks.observation import Observation, Reconstruction


@dataclass(frozen=True)
class Budget:
    """What one reconstruction may spend, in steps and candidates: never seconds, so that numbers compare.

    Attributes:
        steps: gradient steps of a continuous search (all restarts advance together).
        candidates: discrete candidates scored.
        restarts: starts optimised side by side.
    """

    steps: int
    candidates: int
    restarts: int = 1


class Attack(Protocol):
    """What every attack offers (see tests/contracts/test_attacks.py for the suite that it must pass).

    Attributes:
        name: the file's name.
        cite: where it comes from (paper, section).
        presets: preset name -> Budget; the first is the default.
    """

    name: str
    cite: str
    presets: dict[str, Budget]

    def applicable(self, seen: Observation) -> str:
        """Empty when the attack can say something about this message, else the reason why it cannot."""
        ...

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """Propose texts. Deterministic given ``seen`` and ``rng``; ``seen.model`` is left as it was found."""
        ...
