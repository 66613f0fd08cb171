"""Who is audited: a plan, a public batch size, and a way from per-example gradients and a seed to a message."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from dpguard.engine import noise as noises
from dpguard.engine import wire
from dpguard.policy.table import Group, Plan

MASK_SEED = 7
"""Public seed of random pruning masks during an audit."""


class Mechanism(Protocol):
    """What is judged: a function of per-example gradients and a seed."""

    def __call__(self, per_example: Mapping[str, Tensor], seed: int) -> wire.Message:
        """The message for (B, *shape) gradients of every trained tensor, B = 0 included."""
        ...


Builder = Callable[[Plan, int], Mechanism]
"""(plan, public batch size) -> a fresh mechanism without a past."""


class MechanismError(Exception):
    """The audited mechanism raised instead of giving a message."""


def of_the_engine(plan: Plan, batch_size: int) -> Mechanism:
    """The engine's own mechanism: `wire.clip_and_sum`, then `wire.make_message`."""

    def send(per_example: Mapping[str, Tensor], seed: int) -> wire.Message:
        return wire.make_message(
            wire.clip_and_sum(per_example, plan),
            plan,
            batch_size=batch_size,
            generator=noises.source(seed),
            mask_seed=MASK_SEED,
        )

    return send


@dataclass(frozen=True)
class Subject:
    """A plan under audit.

    Attributes:
        plan: with the model's real shapes; the checks shrink it as they need.
        batch_size: the public batch size.
        seed: first seed of everything random in the audit.
        build: makes the mechanism for a plan; a fresh one for every check, so that no check sees the past
            of another.
    """

    plan: Plan
    batch_size: int
    seed: int = 0
    build: Builder = of_the_engine

    def mechanism(self, plan: Plan) -> Mechanism:
        """A fresh mechanism for a (shrunk) plan; what it raises becomes a `MechanismError`."""
        inner = self.build(plan, self.batch_size)

        def send(per_example: Mapping[str, Tensor], seed: int) -> wire.Message:
            try:
                return inner(per_example, seed)
            except Exception as error:
                rows = {g.shape[0] for g in per_example.values()}
                raise MechanismError(f"{type(error).__name__} on a batch of {min(rows, default=0)}: {error}") from error

        return send


@dataclass(frozen=True)
class NoiseClass:
    """Tensors of one clip group that claim the same noise.

    Attributes:
        label: for the report.
        std: claimed standard deviation of one entry of the noised sum, above 0.
        names: its tensors.
    """

    label: str
    std: float
    names: tuple[str, ...]


def noise_classes(plan: Plan, batch_size: int) -> list[NoiseClass]:
    """The trained tensors with noise, by clip group and claimed standard deviation."""
    found: dict[tuple[str, float], list[str]] = {}
    for name in plan.trained:
        rule = plan[name]
        if rule.std(batch_size) > 0:
            found.setdefault((rule.group, rule.std(batch_size)), []).append(name)
    return [NoiseClass(group or "(unclipped)", std, tuple(names)) for (group, std), names in found.items()]


def sensitivity(group: Group, batch_size: int) -> float:
    """How far one unit may move the group's noised SUM: C; a whole update is a mean, so C times the batch size."""
    return group.clip * (batch_size if group.unit == "update" else 1)


def shrunk(plan: Plan, most: int) -> Plan:
    """The same groups and rules on tensors of at most ``most`` coordinates each."""
    rules = {
        name: replace(rule, slot=replace(rule.slot, shape=smaller(rule.slot.shape, most)))
        for name, rule in plan.rules.items()
    }
    return replace(plan, rules=rules)


def only(plan: Plan, names: Collection[str]) -> Plan:
    """The same rules for some tensors alone, as if the model had no others."""
    return replace(plan, rules={name: rule for name, rule in plan.rules.items() if name in names})


def smaller(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """A shape of at most ``most`` entries: long sides are cut to one length, short ones stay.

    >>> smaller((30522, 384), 4096), smaller((2, 384), 256), smaller((5,), 16)
    ((64, 64), (2, 128), (5,))
    """
    sides = range(1, max(shape, default=1) + 1)
    side = max(1, bisect_right(sides, most, key=lambda side: math.prod(min(side, n) for n in shape)))
    return tuple(min(side, n) for n in shape)
