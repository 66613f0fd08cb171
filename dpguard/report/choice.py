"""Choosing under caps, at the bad end of every interval: which policies keep them, and which of those is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dpguard.errors import UserError, did_you_mean
from dpguard.report.board import Row

TIE_DIGITS = 3
"""Utilities equal to this many digits are a tie, which goes to the simpler table."""


@dataclass(frozen=True)
class Caps:
    """What must hold; None sets no cap.

    Attributes:
        max_leakage: for the upper end of leakage, in [0, 1].
        min_utility: for the lower end of utility.
        max_epsilon: for epsilon, above 0.
    """

    max_leakage: float | None = None
    min_utility: float | None = None
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        ranges = {"max_leakage": (0.0, 1.0), "min_utility": (-1.0, 1.0), "max_epsilon": (0.0, math.inf)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                expected = f"a number from {least:g} to {most:g}"
                raise UserError(f"{name} is {value!r}, expected {expected}", loc=("recommend", name))

    @classmethod
    def read(cls, spec: Mapping[str, Any]) -> Caps:
        """The ``recommend`` part of a study file; an absent one sets no cap.

        Raises:
            UserError: an unknown key, or a value out of range.
        """
        told = spec.get("recommend") or {}
        known = [item.name for item in fields(cls)]
        for name in told:
            if name not in known:
                raise UserError(f"unknown key {name!r}{did_you_mean(name, known)}", loc=("recommend", name))
        return cls(**told)

    def __bool__(self) -> bool:
        return any(getattr(self, item.name) is not None for item in fields(self))

    def words(self) -> list[str]:
        """Each cap in words."""
        told = []
        if self.max_leakage is not None:
            told.append(f"leakage at most {self.max_leakage:g}")
        if self.min_utility is not None:
            told.append(f"utility at least {self.min_utility:g}")
        if self.max_epsilon is not None:
            told.append(f"epsilon at most {self.max_epsilon:g}")
        return told


@dataclass(frozen=True)
class Case:
    """A policy that was measured in full, at the bad end of its intervals."""

    row: Row
    leakage: float
    utility: float
    epsilon: float

    @classmethod
    def of(cls, row: Row) -> Case | None:
        """The case of a row; None when a leg of it is missing."""
        if row.leakage is None or row.utility is None or row.epsilon is None:
            return None
        return cls(row, row.leakage.high, row.utility.low, row.epsilon)

    @property
    def policy(self) -> str:
        """Its name."""
        return self.row.policy

    @property
    def simplicity(self) -> tuple[int, int]:
        """Fewer rows are simpler, then fewer columns set."""
        return (self.row.rows, self.row.columns)

    def beats(self, other: Case) -> bool:
        """Leaks no more, is worth no less and has no larger epsilon, with one of the three strict."""
        one, two = ((case.leakage, -case.utility, case.epsilon) for case in (self, other))
        return one != two and all(a <= b for a, b in zip(one, two, strict=True))


def misses(case: Case, caps: Caps) -> dict[str, float]:
    """The caps that a case breaks, each with how far it is beyond it: 0 to 1 for leakage and epsilon."""
    beyond = {}
    if caps.max_leakage is not None and case.leakage > caps.max_leakage:
        beyond["leakage"] = case.leakage - caps.max_leakage
    if caps.min_utility is not None and case.utility < caps.min_utility:
        beyond["utility"] = caps.min_utility - case.utility
    if caps.max_epsilon is not None and case.epsilon > caps.max_epsilon:
        beyond["epsilon"] = 1 - caps.max_epsilon / case.epsilon
    return beyond


def fitting(cases: Sequence[Case], caps: Caps) -> list[Case]:
    """The cases that keep every cap."""
    return [case for case in cases if not misses(case, caps)]


def choose(fit: Sequence[Case], caps: Caps) -> Case:
    """The best of the cases that keep every cap; ``fit`` is not empty. The order of the cases never matters."""
    return next(c for c in sorted(fit, key=_preference(caps)) if not any(other.beats(c) for other in fit))


def _preference(caps: Caps) -> Callable[[Case], tuple[float | str, ...]]:
    if caps.max_leakage is None and caps.max_epsilon is None:
        return lambda c: (round(c.leakage, TIE_DIGITS), *c.simplicity, c.leakage, c.epsilon, c.policy)
    return lambda c: (-round(c.utility, TIE_DIGITS), *c.simplicity, -c.utility, c.leakage, c.epsilon, c.policy)


def after(chosen: Case, fit: Sequence[Case], caps: Caps, most: int) -> list[Case]:
    """The next best of the cases that keep every cap: each is the choice once those before it are gone."""
    left, order = [case for case in fit if case is not chosen], list[Case]()
    while left and len(order) < most:
        order.append(choose(left, caps))
        left.remove(order[-1])
    return order


def rounded_up(value: float, digits: int = 3) -> float:
    """The least number of so many digits that is not below the value: a cap to print that admits it."""
    scale: float = 10.0**digits
    least = math.ceil(round(value * scale, 6))  # a value that is one of them but for its last bits stays it ...
    return (least if least / scale >= value else least + 1) / scale  # ... unless that would not admit it


def rounded_down(value: float, digits: int = 3) -> float:
    """The same from below."""
    return -rounded_up(-value, digits)


def epsilon_up(value: float) -> float:
    """The same for an epsilon, to three digits as it is printed."""
    if not math.isfinite(value) or value <= 0:
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    least = math.ceil(round(value / step, 6))
    found = float(f"{least * step:.6g}")
    return found if found >= value else float(f"{(least + 1) * step:.6g}")
