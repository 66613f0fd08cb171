"""The plug of an attack: one file, one `PLUGIN`, one row of capabilities; the harness judges and counts.

An attack module assigns `PLUGIN`, an object that satisfies `Attack`. It proposes, it never scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.inputs.family import predicts_tokens


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


@dataclass(frozen=True)
class Capability:
    """An attack's row in the table of capabilities: what it reads and what it cannot do (docs/attacks.md).

    The fields that a program can check decide, with their reason, whether the attack runs at all; what only the
    tensors can tell is left to `Attack.applicable`.

    Attributes:
        reads: the tensors that it needs, in words.
        cannot: what it cannot do, in words.
        kinds: kinds of message that it can read.
        several: whether it reads messages of several texts (or of an unknown number).
        tokens: whether it reads messages of models that predict every next token.
        blind: whether it never reads the message.
        published: presets that are somebody's published attack, kept for comparison: on their own, they are neither
            told what other attacks proposed nor given their answers, nor are others told theirs.
    """

    reads: str
    cannot: str
    kinds: tuple[str, ...] = ("gradient",)
    several: bool = True
    tokens: bool = True
    blind: bool = False
    published: tuple[str, ...] = ()

    def reason(self, seen: Observation) -> str:
        """Why the attack cannot say anything about a message of this sort; empty when it may."""
        told = seen.disclosed
        if self.blind:
            return ""
        if not seen.message:
            return "the message holds no tensor"
        if told.kind not in self.kinds:
            return f"the message is a {told.kind}; expected a {' or '.join(self.kinds)}"
        if told.texts != 1 and not self.several:
            return "the message holds several texts (or their number is unknown); expected one text"
        if not self.tokens and predicts_tokens(seen.model):
            return "the model predicts tokens; expected one that names a class"
        return ""


class Attack(Protocol):
    """What every attack offers (see tests/contracts/test_attacks.py for the suite that it must pass).

    Attributes:
        name: the file's name.
        cite: where it comes from (paper, section).
        presets: preset name -> Budget; the first is the default.
        capability: what it needs and cannot do; decides with a reason before `applicable` looks at the tensors.
    """

    name: str
    cite: str
    presets: dict[str, Budget]
    capability: Capability

    def applicable(self, seen: Observation) -> str:
        """Empty when the attack can say something about this message, else the reason why it cannot."""
        ...

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """Propose texts. Deterministic given ``seen`` and ``rng``; ``seen.model`` is left as it was found."""
        ...
