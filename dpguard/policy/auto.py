"""Sweeps that look for one value: ``noise: {auto: {leakage: 0.3}, between: [0.01, 5]}``. Pure functions, no torch here.

What to try next is a function of what was measured so far and of nothing else, so that whoever has the records goes
on where they end. A target epsilon is computed, not measured: `solve`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpguard.errors import UserError, did_you_mean

TARGETS = ("leakage", "utility", "epsilon")
COMPUTED = "epsilon"
VALUES = 8
WITHIN = 0.05
EPSILON_WITHIN = 0.01
"""A solved epsilon is at most this fraction below its target."""
_ANY_NOISE = (0.01, 1000.0)
_KEYS = ("auto", "between", "values", "within")
_WHOLE = ("bits", "batch_size", "local_steps", "rounds", "per_round", "clients", "may_fail")
"""Columns and settings that take whole numbers only."""


@dataclass(frozen=True)
class Auto:
    """What is looked for, and where.

    Attributes:
        variable: the sweep variable.
        target: ``leakage``, ``utility`` or ``epsilon``.
        aim: its value: leakage and epsilon are to be at most this, utility at least.
        low, high: the range, both above 0.
        values: how many values may be measured, the two ends among them.
        within: stop when the upper end of what is left is at most this fraction above the lower end.
        whole: only whole numbers.
    """

    variable: str
    target: str
    aim: float
    low: float
    high: float
    values: int = VALUES
    within: float = WITHIN
    whole: bool = False

    @property
    def computed(self) -> bool:
        """Whether no cell has to run to find it."""
        return self.target == COMPUTED

    def met(self, found: float) -> bool:
        """Whether a measured or computed value keeps the target."""
        return found >= self.aim if self.target == "utility" else found <= self.aim

    def plain(self, value: float) -> float | int:
        """A value as a table takes it."""
        return int(value) if self.whole else value

    def middle(self, low: float, high: float) -> float | None:
        """The value to try between two others: their geometric mean, to four digits; None when there is none."""
        found = float(round(math.sqrt(low * high))) if self.whole else float(f"{math.sqrt(low * high):.4g}")
        if self.whole and not low < found < high:
            found = low + 1
        return found if low < found < high else None


def read_auto(variable: str, entry: Mapping[str, Any], places: set[str]) -> Auto:
    """Read one sweep entry that is a mapping.

    Args:
        variable: the sweep variable.
        entry: ``auto`` (a mapping of one target to its value), ``between``, ``values``, ``within``.
        places: names of the columns and settings that the variable stands for.

    Raises:
        UserError: what cannot be meant; ``loc`` is relative to ``entry``.

    >>> read_auto("noise", {"auto": {"leakage": 0.3}, "between": [0.01, 5]}, {"noise"}).high
    5.0
    """
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}", loc=(key,))
    target, aim = _aim(entry.get("auto"))
    if target == COMPUTED:
        for key in ("values", "within"):
            if key in entry:
                raise UserError(f"{key} is for what is measured; an epsilon is computed, expected none", loc=(key,))
    elif "between" not in entry:
        raise UserError(f"sweep {variable!r} has no 'between'; expected the range to look in, such as [0.01, 5]")
    low, high = _range(entry.get("between", list(_ANY_NOISE)))
    whole = bool(places & set(_WHOLE))
    if whole and (low != int(low) or high != int(high)):
        raise UserError(f"between is {entry['between']!r}; expected whole numbers for {variable!r}", loc=("between",))
    values, within = entry.get("values", VALUES), entry.get("within", WITHIN)
    if isinstance(values, bool) or not isinstance(values, int) or values < 3:
        raise UserError(f"values is {values!r}; expected a whole number from 3 on", loc=("values",))
    if not _number(within) or not 0 < within < math.inf:
        raise UserError(f"within is {within!r}; expected a number above 0, such as 0.05", loc=("within",))
    return Auto(variable, target, aim, low, high, values, float(within), whole)


def _aim(asked: Any) -> tuple[str, float]:
    if not isinstance(asked, Mapping) or len(asked) != 1:
        raise UserError(f"auto is {asked!r}; expected one target, such as {{leakage: 0.3}}", loc=("auto",))
    [(target, aim)] = asked.items()
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}{did_you_mean(str(target), TARGETS)}", loc=("auto", target))
    limits = {"leakage": "a number from 0 to 1", "utility": "a number from -1 to 1", "epsilon": "a number above 0"}
    fits = {"leakage": lambda x: 0 <= x <= 1, "utility": lambda x: -1 <= x <= 1, "epsilon": lambda x: 0 < x < math.inf}
    if not _number(aim) or not fits[target](aim):
        raise UserError(f"{target} is {aim!r}; expected {limits[target]}", loc=("auto", target))
    return target, float(aim)


def _range(between: Any) -> tuple[float, float]:
    numbers = isinstance(between, list) and len(between) == 2 and all(map(_number, between))
    if not numbers or not 0 < between[0] < between[1] < math.inf:
        raise UserError(
            f"between is {between!r}; expected two numbers above 0, the smaller first, such as [0.01, 5]",
            loc=("between",),
        )
    return float(between[0]), float(between[1])


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Step:
    """What the measurements so far say.

    Attributes:
        ask: values to measure next; none when the search has ended.
        sentence: how it ended, "" while it goes on.
    """

    ask: tuple[float, ...] = ()
    sentence: str = ""


@dataclass(frozen=True)
class Measured:
    """What is known of one value: ``found``, or why there is nothing."""

    found: float | None = None
    reason: str = ""


@dataclass
class _Path:
    """The values on the way, in the order in which they were asked for."""

    auto: Auto
    known: dict[float, float] = field(default_factory=dict)

    def said(self, value: float) -> str:
        return f"{self.auto.variable}={value:g} ({self.auto.target} {self.known[value]:.3g})"

    def contradiction(self) -> str:
        """The largest step against the direction in which the two ends differ, in a clause."""
        order = sorted(self.known)
        sign = 1 if self.known[order[-1]] >= self.known[order[0]] else -1
        steps = [(sign * (self.known[a] - self.known[b]), a, b) for a, b in itertools.pairwise(order)]
        worst = max(steps, default=(0.0, 0.0, 0.0))
        if worst[0] <= 0:
            return ""
        verb = "rises" if sign > 0 else "falls"
        return (
            f"; the measurements contradict that {self.auto.target} {verb} with {self.auto.variable}: "
            f"{self.said(worst[1])}, then {self.said(worst[2])}"
        )


def step(auto: Auto, measured: Mapping[float, Measured]) -> Step:
    """Replay the bisection over what was measured, and say what to measure next or how it ended.

    The ends of the range come first, then the geometric mean of the two neighbours between which the target is
    crossed, until they are `Auto.within` of each other or `Auto.values` values are spent.

    Args:
        auto: what is looked for, by measuring.
        measured: value -> what is known of it; others than those on the way are not looked at.

    >>> auto = Auto("noise", "leakage", 0.3, 0.01, 1.0)
    >>> step(auto, {}).ask, step(auto, {0.01: Measured(0.9), 1.0: Measured(0.1)}).ask
    ((0.01, 1.0), (0.1,))
    """
    path = _Path(auto)
    ends = (auto.low, auto.high)
    missing = tuple(value for value in ends if value not in measured)
    if missing:
        return Step(missing)
    for value in ends:
        if not _take(path, value, measured):
            return _blocked(path, value, measured)
    low, high = ends
    if auto.met(path.known[low]) == auto.met(path.known[high]):
        return _outside(path)
    low_met = auto.met(path.known[low])
    while high / low - 1 > auto.within:
        middle = auto.middle(low, high)
        if middle is None:
            break
        if middle not in measured:
            return _spent(path, low, high) if len(path.known) >= auto.values else Step((middle,))
        if not _take(path, middle, measured):
            return _blocked(path, middle, measured)
        if auto.met(path.known[middle]) == low_met:
            low = middle
        else:
            high = middle
    return _ended(path, low, high)


def _take(path: _Path, value: float, measured: Mapping[float, Measured]) -> bool:
    found = measured[value].found
    if found is not None:
        path.known[value] = found
    return found is not None


def _head(path: _Path) -> str:
    return f"{path.auto.variable} for {path.auto.target} {path.auto.aim:g}"


def _ended(path: _Path, low: float, high: float, *, why: str = "") -> Step:
    """Which neighbour keeps the target, and which no longer does."""
    kept, lost = (low, high) if path.auto.met(path.known[low]) else (high, low)
    told = f"{path.said(kept)} keeps it, {path.said(lost)} does not"
    return Step(sentence=f"{_head(path)}: {told}{why}{path.contradiction()}")


def _spent(path: _Path, low: float, high: float) -> Step:
    return _ended(path, low, high, why=f"; all {path.auto.values} values are spent")


def _outside(path: _Path) -> Step:
    every = path.auto.met(path.known[path.auto.low])
    told = "both ends of the range keep it" if every else "no end of the range keeps it"
    ends = f"{path.said(path.auto.low)} and {path.said(path.auto.high)}"
    return Step(sentence=f"{_head(path)}: {told}, {ends}; expected another range{path.contradiction()}")


def _blocked(path: _Path, value: float, measured: Mapping[float, Measured]) -> Step:
    told = f"it ends at {path.auto.variable}={value:g}, which gave no {path.auto.target}"
    return Step(sentence=f"{_head(path)}: {told}: {measured[value].reason}")


def solve(auto: Auto, epsilon_at: Callable[[float], float]) -> tuple[float, str]:
    """The value in the range that keeps a target epsilon and nearly uses it up.

    False position on the logarithms (epsilon is nearly a power of the noise), every third time a plain bisection.

    Args:
        auto: with a target epsilon.
        epsilon_at: epsilon of the policy at a value; monotone.

    Returns:
        The value, rounded to five digits towards the side that keeps the target; its epsilon is at most the target and
        at most 1 % below it. Where the target is outside of the range, the end nearest to it, and a sentence saying so.

    >>> solve(Auto("noise", "epsilon", 2.0, 0.01, 100), lambda noise: 5 / noise)[0]
    2.5126
    """
    ends = {value: epsilon_at(value) for value in (auto.low, auto.high)}
    met = {value: auto.met(found) for value, found in ends.items()}
    if met[auto.low] == met[auto.high]:
        sign = -1 if met[auto.low] else 1
        nearest = min(ends, key=lambda value: (sign * ends[value], -value))
        told = "keep" if met[auto.low] else "exceed"
        return nearest, (
            f"{auto.variable} for epsilon {auto.aim:g}: both ends of the range {told} it, "
            f"{auto.variable}={auto.low:g} (epsilon {ends[auto.low]:.3g}) and {auto.variable}={auto.high:g} "
            f"(epsilon {ends[auto.high]:.3g}); {auto.variable}={nearest:g} is taken, expected another range"
        )
    kept, lost = (auto.high, auto.low) if met[auto.high] else (auto.low, auto.high)
    kept, lost = _closed(auto, epsilon_at, (kept, ends[kept]), (lost, ends[lost]))
    if auto.whole:
        return kept, ""
    rounded = _rounded(kept, up=kept > lost)
    return min(max(rounded, auto.low), auto.high), ""


def _closed(
    auto: Auto, epsilon_at: Callable[[float], float], kept: tuple[float, float], lost: tuple[float, float]
) -> tuple[float, float]:
    """Two values around the target, the first keeping it closely."""
    for turn in range(80):
        low, high = sorted((kept[0], lost[0]))
        if high / low < 1 + 1e-9 or kept[1] >= auto.aim * (1 - EPSILON_WITHIN):
            break
        middle = _guess(auto, kept, lost) if turn % 3 < 2 and not auto.whole else math.nan
        if not low < middle < high:
            middle = auto.middle(low, high) or math.nan if auto.whole else math.sqrt(low * high)
        if not low < middle < high:
            break
        found = (middle, epsilon_at(middle))
        if auto.met(found[1]):
            kept = found
        else:
            lost = found
    return kept[0], lost[0]


def _guess(auto: Auto, kept: tuple[float, float], lost: tuple[float, float]) -> float:
    if not 0 < kept[1] < lost[1] < math.inf:
        return math.nan
    slope = math.log(lost[1] / kept[1]) / math.log(lost[0] / kept[0])
    return kept[0] * math.exp(math.log(auto.aim * (1 - EPSILON_WITHIN / 2) / kept[1]) / slope)


def _rounded(value: float, *, up: bool) -> float:
    digits = 4 - math.floor(math.log10(value))
    scaled = value * 10**digits
    return float(f"{(math.ceil(scaled * (1 - 1e-12)) if up else math.floor(scaled * (1 + 1e-12))) / 10**digits:.5g}")
