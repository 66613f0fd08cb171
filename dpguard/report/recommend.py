"""Which policy to share, under the caps that the user set: decided at the bad end of every interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dpguard.errors import UserError, did_you_mean
from dpguard.report.frontier import CONTROL, FLOOR, Frontier, Row
from dpguard.report.text import epsilon as show_epsilon
from dpguard.report.text import metric_name, number, visible

Verdict = Literal["recommended", "none qualifies", "no caps", "no power", "no control"]

POWER = 0.5
"""The undefended control must leak at least this much of the metric, or the attack proves nothing."""
LEAD = 0.2
"""And this much more than the prior attack, which sees no message."""

TIE_DIGITS = 3
"""Utilities equal to this many digits are a tie, which goes to the shorter table."""


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
class Recommendation:
    """The decision, in words.

    Attributes:
        verdict: what kind of answer this is; a policy is named only for "recommended".
        sentence: the answer.
        policy: the recommended policy, or empty.
        why: the caps and how far from each the policy is, and who else qualified.
        limits: what it does not protect.
        sensitivity: what relaxing a cap would gain.
        caps: the caps it was decided under.
    """

    verdict: Verdict
    sentence: str
    policy: str = ""
    why: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    sensitivity: tuple[str, ...] = ()
    caps: Caps = field(default_factory=Caps)


@dataclass(frozen=True)
class _Case:
    """A whole row at the bad end of its intervals."""

    row: Row
    leakage: float
    utility: float
    epsilon: float

    @property
    def policy(self) -> str:
        return self.row.policy


def recommend(
    frontier: Frontier,
    *,
    max_leakage: float | None = None,
    min_utility: float | None = None,
    max_epsilon: float | None = None,
) -> Recommendation:
    """Choose the policy of highest utility among those that keep every cap.

    Leakage counts by its upper end and utility by its lower end. A policy that another qualifying one beats
    in leakage, utility or epsilon, and nowhere falls short of, is never chosen; of the rest, utilities equal
    to three digits are a tie and the shortest table wins. With neither a leakage nor an epsilon cap, the
    undefended control would always win: then the least leaking policy of sufficient utility is chosen.

    Args:
        frontier: of the study.
        max_leakage: cap on leakage, in [0, 1].
        min_utility: least utility.
        max_epsilon: cap on epsilon.

    Raises:
        UserError: a cap out of range.
    """
    caps = Caps(max_leakage, min_utility, max_epsilon)
    power = no_power(frontier)
    if power:
        verdict, sentence = power
        return Recommendation(verdict, sentence, caps=caps)
    if not caps:
        sentence = "No caps were set, so no policy is recommended: the frontier below is the answer."
        return Recommendation("no caps", sentence, caps=caps)
    cases = [case for row in frontier.rows if (case := _case(row))]
    fit = [case for case in cases if not misses(case, caps)]
    if not fit:
        return _none_qualifies(frontier, cases, caps)
    chosen = choose(fit, caps)
    return Recommendation(
        "recommended",
        _sentence(frontier, chosen),
        chosen.policy,
        tuple(_why(chosen, fit, caps)),
        tuple(_limits(frontier, chosen.row)),
        tuple(_sensitivity(chosen, cases, caps)),
        caps,
    )


def no_power(frontier: Frontier) -> tuple[Verdict, str] | None:
    """Why nothing can be concluded from the attacks, or None when the undefended control was recovered."""
    control, floor = frontier.ceiling, frontier.floor
    if control is None or control.leakage is None:
        reasons = "; ".join(visible(gap.reason, limit=300) for gap in control.gaps) if control else ""
        tail = f" ({reasons})" if reasons else ""
        return "no control", f"The undefended control was not measured{tail}; nothing can be concluded."
    if floor is None:
        return "no control", "The prior attack, which is the floor, did not run; nothing can be concluded."
    reached = control.leakage
    if reached.value >= POWER and reached.value - floor.value >= LEAD and reached.low > floor.value:
        return None
    name = metric_name(frontier.leakage_metric)
    if reached.value >= POWER and reached.value - floor.value >= LEAD:
        return "no power", (
            f"Too few texts to conclude anything: without any protection the attack reached {number(reached.value)} "
            f"{name} on {reached.n} of them, and from so few it may be as low as {number(reached.low)}, where a guess "
            f"that sees no message reaches {number(floor.value)}; raise leakage.targets."
        )
    return "no power", (
        f"This attack has no power here; nothing can be concluded. Without any protection it reached "
        f"{number(reached.value)} {name}, where a guess that sees no message reaches {number(floor.value)}."
    )


def choose(fit: Sequence[_Case], caps: Caps) -> _Case:
    """The best of the cases that keep every cap; ``fit`` is not empty."""
    rest = [case for case in fit if not any(_beats(other, case) for other in fit)]
    if caps.max_leakage is None and caps.max_epsilon is None:
        return min(rest, key=lambda c: (round(c.leakage, TIE_DIGITS), c.row.rows, c.leakage))
    return min(rest, key=lambda c: (-round(c.utility, TIE_DIGITS), c.row.rows, -c.utility))


def misses(case: _Case, caps: Caps) -> dict[str, float]:
    """The caps that a case breaks, each with how far it is beyond it: 0 to 1 for leakage and epsilon."""
    beyond = {}
    if caps.max_leakage is not None and case.leakage > caps.max_leakage:
        beyond["leakage"] = case.leakage - caps.max_leakage
    if caps.min_utility is not None and case.utility < caps.min_utility:
        beyond["utility"] = caps.min_utility - case.utility
    if caps.max_epsilon is not None and case.epsilon > caps.max_epsilon:
        beyond["epsilon"] = 1 - caps.max_epsilon / case.epsilon
    return beyond


def _case(row: Row) -> _Case | None:
    if row.leakage is None or row.utility is None or row.epsilon is None:
        return None
    return _Case(row, row.leakage.high, row.utility.low, row.epsilon)


def _beats(one: _Case, two: _Case) -> bool:
    first, second = (one.leakage, -one.utility, one.epsilon), (two.leakage, -two.utility, two.epsilon)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _sentence(frontier: Frontier, case: _Case) -> str:
    row = case.row
    guarantee = f"epsilon is {show_epsilon(row.epsilon)}" if row.formal else "there is no formal guarantee"
    return (
        f"Use {visible(row.policy)}: {metric_name(frontier.utility_metric)} is at least "
        f"{number(case.utility, 3)}, leakage ({metric_name(frontier.leakage_metric)}) at most "
        f"{number(case.leakage, 3)}, and {guarantee}."
    )


def _why(chosen: _Case, fit: Sequence[_Case], caps: Caps) -> list[str]:
    told = []
    if caps.max_leakage is not None:
        told.append(
            f"Leakage is at most {number(chosen.leakage, 3)} (upper end of the interval), "
            f"{number(caps.max_leakage - chosen.leakage, 3)} under the cap of {caps.max_leakage:g}."
        )
    if caps.min_utility is not None:
        told.append(
            f"Utility is at least {number(chosen.utility, 3)} (lower end of the interval), "
            f"{number(chosen.utility - caps.min_utility, 3)} above the {caps.min_utility:g} asked for."
        )
    if caps.max_epsilon is not None:
        told.append(f"Epsilon is {show_epsilon(chosen.epsilon)}, under the cap of {caps.max_epsilon:g}.")
    others = [case for case in fit if case is not chosen]
    if not others:
        told.append("No other policy keeps every cap.")
        return told
    second = choose(others, caps)
    told.append(
        f"{len(others)} other {'policy keeps' if len(others) == 1 else 'policies keep'} every cap; the next is "
        f"{visible(second.policy)} (utility at least {number(second.utility, 3)}, leakage at most "
        f"{number(second.leakage, 3)}, epsilon {show_epsilon(second.epsilon)})."
    )
    if caps.max_leakage is None and caps.max_epsilon is None:
        told.append("With no cap on leakage or epsilon, the least leaking policy of enough utility is chosen.")
    return told


def _limits(frontier: Frontier, row: Row) -> list[str]:
    told = []
    if not row.formal:
        told.append(
            "There is no formal guarantee (epsilon is infinite): the leakage is what these attacks recovered, "
            "and a stronger attack may recover more."
        )
    if set(row.attacks) <= {FLOOR}:
        told.append("No attack but the guess without a message could be run against this policy.")
    floor = frontier.floor
    if row.leakage and floor and row.leakage.low > floor.value:
        told.append(
            f"Something still leaks: the best attack reaches {number(row.leakage.value)}, "
            f"a guess that sees no message {number(floor.value)}."
        )
    if row.formal:
        told.append("Epsilon covers the training alone: not this choice of policy, and not this report.")
    if row.policy == CONTROL:
        told.append("Nothing is protected: the whole gradient leaves the client as it is.")
    return told


def _sensitivity(chosen: _Case, cases: Sequence[_Case], caps: Caps) -> list[str]:
    """For each cap, the nearest policy that relaxing this cap alone would put first, and what it would gain."""
    by_leakage: Callable[[_Case], float] = lambda c: c.leakage  # noqa: E731
    by_epsilon: Callable[[_Case], float] = lambda c: c.epsilon  # noqa: E731
    told = []
    for name, key in (("leakage", by_leakage), ("epsilon", by_epsilon)):
        better = [c for c in cases if set(misses(c, caps)) == {name} and c.utility > chosen.utility]
        if not better:
            continue
        near = min(better, key=key)
        cost = number(near.leakage, 3) if name == "leakage" else show_epsilon(near.epsilon)
        told.append(
            f"Allowing {name} up to {cost} would admit {visible(near.policy)} and gain "
            f"{number(near.utility - chosen.utility, 3)} of utility."
        )
    safer = [c for c in cases if set(misses(c, caps)) == {"utility"} and c.leakage < chosen.leakage]
    if safer:
        near = max(safer, key=lambda c: c.utility)
        told.append(
            f"Accepting a utility of {number(near.utility, 3)} would admit {visible(near.policy)} and bring "
            f"leakage down by {number(chosen.leakage - near.leakage, 3)}."
        )
    return told


def _none_qualifies(frontier: Frontier, cases: Sequence[_Case], caps: Caps) -> Recommendation:
    asked = ", ".join(caps.words())
    start = f"None qualifies: no policy keeps {asked}, at the bad end of the intervals."
    unknown = len(frontier.rows) - len(cases)
    why = []
    if unknown:
        noun = "policy was" if unknown == 1 else "policies were"
        why.append(f"{unknown} {noun} not measured in full and could not be considered.")
    if not cases:
        return Recommendation("none qualifies", f"{start} No policy was measured in full.", caps=caps)
    near = min(cases, key=lambda c: (len(misses(c, caps)), sum(misses(c, caps).values()), c.row.rows))
    told = {
        "leakage": f"leakage of up to {number(near.leakage, 3)}",
        "utility": f"utility of only {number(near.utility, 3)}",
        "epsilon": f"epsilon of {show_epsilon(near.epsilon)}",
    }
    missed = " and ".join(f"its {told[name]}" for name in misses(near, caps))
    sentence = f"{start} The nearest miss is {visible(near.policy)}, for {missed}."
    return Recommendation("none qualifies", sentence, why=tuple(why), caps=caps)
