"""What the adversary holds: the tensors on the wire, the public model, and what the threat model discloses.

Nothing here can hold the truth: `Observation` has no field for it, and this room may import neither
`measure.truth` nor a metric (kept by import-linter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dpguard.policy.table import Plan


@dataclass(frozen=True)
class Disclosed:
    """What an honest-but-curious server knows besides the message (Kerckhoffs: the plan is public).

    Attributes:
        tokenizer: the public tokenizer (Hugging Face fast tokenizer).
        plan: the policy resolved against the model.
        batch_size: the public batch size, the divisor of the message; always known.
        sequences: how many texts were in the batch (batch 1 attacks need it), or None when not disclosed.
        kind: "gradient" (one step) or "delta" (weights after some local steps minus weights before them).
        mode: "eval" (dropout off) or "train", as the client ran.
        public_texts: texts of the same kind that anybody has; decontaminated by whoever builds the panel.
        labels: (sequences,) class indices when the threat model discloses them, else None.
        lengths: (sequences,) token counts with special tokens when disclosed, else None.
        candidates: shuffled candidate texts of the closed world, index hidden; empty in the open world.
        mask_seed: public seed of random pruning masks.
        local_steps: how many steps a delta holds, each over the same texts.
        learning_rate: of those steps (plain SGD); None for a gradient or another optimizer.
        clients: how many clients' messages were averaged; the message holds the texts of all of them.
        momentum: of the steps of a delta.
    """

    tokenizer: Any
    plan: Plan
    batch_size: int
    sequences: int | None = 1
    kind: str = "gradient"
    mode: str = "eval"
    public_texts: Sequence[str] = ()
    labels: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    candidates: Sequence[str] = ()
    mask_seed: int = 0
    local_steps: int = 1
    learning_rate: float | None = None
    clients: int = 1
    momentum: float = 0.0

    @property
    def texts(self) -> int:
        """How many texts the message holds: as disclosed, else as many as its public divisors say."""
        return self.sequences if self.sequences is not None else self.batch_size * self.clients

    @property
    def noise_gain(self) -> float:
        """Noise on a delta per noise on one step's mean gradient: the steps' weights in it, in quadrature."""
        weights = [sum(self.momentum**later for later in range(self.local_steps - k)) for k in range(self.local_steps)]
        return (self.learning_rate or 0.0) * math.sqrt(sum(weight**2 for weight in weights))


@dataclass(frozen=True)
class Observation:
    """One message as the server receives it.

    Attributes:
        message: parameter name -> tensor of the parameter's shape, exactly what left the client
            (sum of clipped per-example gradients plus noise, divided by the public batch size, then
            pruned and quantised). Withheld and frozen parameters are absent.
        model: the public model at the weights that the client used; attacks never change it.
        disclosed: what the threat model gives away besides.
        earlier: (attack, what it proposed) of the panel's cheaper attacks on this very message.
    """

    message: Mapping[str, Tensor]
    model: nn.Module
    disclosed: Disclosed
    earlier: tuple[tuple[str, Reconstruction], ...] = ()

    def noise_std(self, name: str) -> float:
        """Standard deviation of the noise on one entry of a tensor of the message, as it arrived; 0 = none.

        inf = there is noise of unknown size: Adam's local steps rescale each entry's by what is private.
        """
        told = self.disclosed
        rule = told.plan[name]
        if told.kind == "gradient":
            std = rule.std(told.batch_size) / told.batch_size
        elif rule.unit == "update" or not rule.noise:
            std = rule.std(1) if rule.noise else rule.noise_std
        elif told.learning_rate is None:
            return math.inf
        else:
            std = told.noise_gain * rule.std(told.batch_size) / told.batch_size
        return std / math.sqrt(told.clients)

    @property
    def proposals(self) -> tuple[tuple[int, ...], ...]:
        """Distinct texts (token ids) that cheaper attacks proposed, in the order in which they ran."""
        return tuple(dict.fromkeys(tuple(ids) for _, found in self.earlier for ids in found.sequences))


@dataclass(frozen=True)
class Reconstruction:
    """What an attack proposes. It carries no score: judging is the harness's work.

    Attributes:
        sequences: guessed token ids, one list a text, special tokens included or not (judges strip them).
        certain: one flag a sequence: the attack KNOWS it is right (residual at numerical zero), not hopes.
        steps: optimiser steps spent.
        candidates: candidates evaluated.
        notes: figures of the attack's own, e.g. {"rank": 13, "residual": 2e-11, "weight": "..."}.
    """

    sequences: list[list[int]]
    certain: list[bool]
    steps: int = 0
    candidates: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
