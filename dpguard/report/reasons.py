"""The decision in words: why, what it does not protect, and what another cap would change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from dpguard.report.board import CONTROL, Frontier, Row
from dpguard.report.choice import (
    TIE_DIGITS,
    Caps,
    Case,
    after,
    choose,
    epsilon_up,
    fitting,
    misses,
    rounded_down,
    rounded_up,
)
from dpguard.report.text import at_name, count, metric_name, number, visible
from dpguard.report.text import epsilon as show_epsilon

NEXT = 2
"""How many of the policies that come after the recommended one are compared with it in words."""
NAMED = 4
"""How many policies a sentence names before it counts the others."""


def answer(frontier: Frontier, case: Case) -> str:
    """The recommendation in one sentence."""
    row = case.row
    guarantee = f"epsilon is {show_epsilon(row.epsilon)}" if row.formal else "there is no formal guarantee"
    return (
        f"Use {visible(row.policy)}: {metric_name(frontier.utility_metric)} is at least "
        f"{number(rounded_down(case.utility), 3)}, leakage ({metric_name(frontier.leakage_metric)}) at most "
        f"{number(rounded_up(case.leakage), 3)}, and {guarantee}."
    )


def called(policy: str) -> str:
    """A policy's name inside a sentence, where the control's would read as its opposite.

    >>> called("none"), called("dp-sgd")
    ('the policy “none”', 'dp-sgd')
    """
    return f"the policy “{policy}”" if policy == CONTROL else visible(policy)


def caution(frontier: Frontier, case: Case) -> str:
    """That no attack could read the policy's messages, or that it is not shown to beat an answer without a model."""
    told = ["No attack could read its messages: its leakage is that of a guess."] if case.row.guessed else []
    idle = "" if _learnt(frontier, case.utility) else "It is not shown to have learnt anything."
    weak = no_use(frontier)
    told += [weak, idle] if weak else [_idle(frontier, case)]
    return " ".join(filter(None, told))


def _learnt(frontier: Frontier, utility: float) -> bool:
    """Whether a utility, at its lower end, is above that of an answer without a model."""
    return frontier.idle is None or utility > frontier.idle


def _idle(frontier: Frontier, case: Case) -> str:
    if _learnt(frontier, case.utility):
        return ""
    return (
        f"But it is not shown to have learnt anything: always answering {frontier.commonest} reaches "
        f"{metric_name(frontier.utility_metric)} {number(frontier.idle, 3)}."
    )


def no_use(frontier: Frontier) -> str:
    """That utility has no power: not even the undefended control is shown to have learnt anything; else empty."""
    control = frontier.ceiling
    if control is None or control.utility is None or _learnt(frontier, control.utility.low):
        return ""
    alike = " (all test texts are of one class)" if frontier.majority == 1 and not frontier.by_client else ""
    return (
        f"Utility has no power here: without any defence {metric_name(frontier.utility_metric)} may be as low as "
        f"{number(control.utility.low, 3)}, where always answering {frontier.commonest} reaches "
        f"{number(frontier.idle, 3)}{alike}."
    )


def no_use_of_any(frontier: Frontier, cases: Sequence[Case]) -> str:
    """The same where nothing is chosen yet, with what it means for these cases."""
    told = no_use(frontier)
    if not told or any(_learnt(frontier, case.utility) for case in cases):
        return told
    return f"{told} What is chosen would not be shown to have learnt anything."


def points(value: float) -> str:
    """A difference of scores in points of a hundredth, without its sign.

    >>> points(-0.0312)
    '3.1 points'
    """
    return f"{number(abs(100 * value), 1)} points"


def why(frontier: Frontier, chosen: Case, fit: Sequence[Case], caps: Caps) -> list[str]:
    """The caps with the distance to each, the proven bound, and the distances to the next policies."""
    told = []
    if caps.max_leakage is not None:
        told.append(
            f"Leakage is at most {number(rounded_up(chosen.leakage), 3)} (upper end of the interval), "
            f"{number(caps.max_leakage - chosen.leakage, 3)} under the cap of {caps.max_leakage:g}."
        )
    if caps.min_utility is not None:
        told.append(
            f"Utility is at least {number(rounded_down(chosen.utility), 3)} (lower end of the interval), "
            f"{number(chosen.utility - caps.min_utility, 3)} above the {caps.min_utility:g} asked for."
        )
    if caps.max_epsilon is not None:
        room = show_epsilon(caps.max_epsilon - chosen.epsilon)
        told.append(f"Epsilon is {show_epsilon(chosen.epsilon)}, {room} under the cap of {caps.max_epsilon:g}.")
    exact = chosen.row.measures.get("exact_match")
    if exact and exact.bound is not None and exact.upper is not None and exact.bound < 0.5:
        told.append(
            f"Whatever the attack, {chosen.row.saw} gives a text away whole with chance at most {exact.bound:.2g}, "
            f"where a guess does with at most {exact.upper:.2g}; over the whole training, epsilon is the promise."
        )
    told += _next(chosen, fit, caps, metric_name(frontier.utility_metric))
    if caps.max_leakage is None and caps.max_epsilon is None:
        told.append("With no cap on leakage or epsilon, the least leaking policy of enough utility is chosen.")
    return told + unmeasured(frontier)


def _next(chosen: Case, fit: Sequence[Case], caps: Caps, metric: str) -> list[str]:
    others = len(fit) - 1
    if not others:
        return ["No other policy keeps every cap."]
    keep = "policy keeps" if others == 1 else "policies keep"
    told = [f"{others} other {keep} every cap."]
    for place, case in zip(("Next", "Then"), after(chosen, fit, caps, NEXT), strict=False):
        told.append(
            f"{place} comes {visible(case.policy)}, at the bad ends of the intervals: "
            f"{_signed(case.utility - chosen.utility)} of {metric}, "
            f"{_signed(case.leakage - chosen.leakage)} of leakage, epsilon {show_epsilon(case.epsilon)}"
            f"{_simpler(chosen, case)}."
        )
    return told


def _signed(value: float) -> str:
    shown = number(100 * value, 1)
    return f"{shown if shown.startswith('−') or shown == '0.0' else '+' + shown} points"


def _simpler(chosen: Case, other: Case) -> str:
    """Says that a tie went to the simpler table, where one did."""
    if round(chosen.utility, 3) != round(other.utility, 3) or chosen.simplicity >= other.simplicity:
        return ""
    (rows, columns), (more_rows, more_columns) = chosen.simplicity, other.simplicity
    if rows != more_rows:
        return f" (as useful to three digits, and its table has {count(more_rows, 'row')}, not {rows})"
    return f" (as useful to three digits, and its table sets {count(more_columns, 'column')}, not {columns})"


def unmeasured(frontier: Frontier) -> list[str]:
    """Which policies could not be considered, because a leg of theirs is missing."""
    legs = {row.policy: _lacking(row) for row in frontier.rows if Case.of(row) is None}
    if not legs:
        return []
    named = [f"{visible(policy, limit=60)} ({', '.join(lack)})" for policy, lack in list(legs.items())[:NAMED]]
    more = f" and {len(legs) - NAMED} more" if len(legs) > NAMED else ""
    was = "1 policy was" if len(legs) == 1 else f"{len(legs)} policies were"
    return [f"{was} not measured in full and could not be considered: {', '.join(named)}{more}."]


def _lacking(row: Row) -> list[str]:
    legs = (("leakage", row.leakage), ("utility", row.utility), ("guarantee", row.epsilon))
    return [f"no {name}" for name, value in legs if value is None]


def limits(frontier: Frontier, row: Row) -> list[str]:
    """What the recommended policy does not protect, and what its numbers do not say."""
    told = []
    if not row.formal:
        told.append(
            "There is no formal guarantee (epsilon is infinite): the leakage is what these attacks recovered, "
            "and a stronger attack may recover more."
        )
    if row.guessed:
        told.append("No attack but the guess without a message could be run against this policy.")
    floor = row.floor or frontier.floor
    if row.leakage and floor and row.leakage.low > floor.value:
        told.append(
            f"Something still leaks: the best attack reaches {number(row.leakage.value)}, "
            f"a guess that sees no message {number(floor.value)}."
        )
    if row.exact and row.exact.value > 0:
        told.append(f"{number(100 * row.exact.value, 1)} % of the attacked texts came back word for word.")
    exact = row.measures.get("exact_match")
    if exact and exact.bound is not None and exact.bound >= 0.5:
        told.append(
            f"The guarantee alone allows a text to come back whole from {row.saw} with chance up to "
            f"{exact.bound:.2g}: that less came back is measured, not proven."
        )
    if row.formal:
        whom = "client: a person with several clients is" if _whole_updates(row) else "text: a person with several is"
        told.append(f"Epsilon is about one {whom} protected less.")
        told.append("Epsilon covers the training alone: not this choice of policy, and not this report.")
    if row.policy == CONTROL:
        told.append("Nothing is protected: the whole gradient leaves the client as it is.")
    return told + _not_measured(row)


def _whole_updates(row: Row) -> bool:
    return any(line.get("unit") == "update" for line in row.table)


def _not_measured(row: Row) -> list[str]:
    """What the numbers of a row leave out."""
    told = []
    if len(row.positions) == 1:
        [only] = row.positions
        told.append(f"Only messages from the {at_name(only)} were attacked.")
    if row.utility and row.utility.seeds == 1:
        told.append("Utility is that of one training: the luck of its seed is not in the interval.")
    return told


Relaxed = tuple[str, Caps, Case, float]
"""Which cap, the caps with it relaxed, a policy that this alone admits, and the cap's new value."""


def _relaxed(cases: Sequence[Case], caps: Caps) -> Iterator[Relaxed]:
    """Every way to relax one cap alone so that it admits another policy, the nearest first for each cap."""
    ways: tuple[tuple[str, str, Callable[[Case], float], Callable[[Case], float]], ...] = (
        ("leakage", "max_leakage", lambda c: c.leakage, lambda c: rounded_up(c.leakage)),
        ("epsilon", "max_epsilon", lambda c: c.epsilon, lambda c: epsilon_up(c.epsilon)),
        ("utility", "min_utility", lambda c: -c.utility, lambda c: rounded_down(c.utility)),
    )
    for name, cap, near, admits in ways:
        for case in sorted((c for c in cases if set(misses(c, caps)) == {name}), key=lambda c: (near(c), c.policy)):
            value = admits(case)
            yield name, replace(caps, **{cap: value}), case, value


def sensitivity(frontier: Frontier, chosen: Case, cases: Sequence[Case], caps: Caps) -> list[str]:
    """For each cap, the least relaxing of it alone that changes the choice for the better, and what that would gain."""
    metric = frontier.utility_metric
    told: dict[str, str] = {}
    changes: dict[str, float] = {}
    for name, relaxed, _, value in _relaxed(cases, caps):
        if name in told:
            continue
        other = choose(fitting(cases, relaxed), relaxed)
        if other is chosen:
            continue
        changes.setdefault(name, value)
        gain, less = other.utility - chosen.utility, chosen.leakage - other.leakage
        if name == "utility" and less > 0:
            told[name] = (
                f"Accepting {points(gain)} less {metric_name(metric)} (at least {number(value, 3)}) would bring "
                f"leakage down by {points(less)}: {called(other.policy)} would be chosen{_but_idle(frontier, other)}."
            )
        elif name != "utility" and gain > 0:
            told[name] = (
                f"{_with(name, value, caps)} you would gain {points(gain)} of {metric_name(metric)}: "
                f"{called(other.policy)} would be chosen{_but_idle(frontier, other)}."
            )
    safer = [] if "utility" in told else _safer(frontier, chosen, cases, caps)
    return [*told.values(), *safer, *_steady(chosen, caps, changes), *_whatever(frontier)]


def _but_idle(frontier: Frontier, case: Case) -> str:
    """The caution at a policy that another cap would admit."""
    return "" if _learnt(frontier, case.utility) else ", which is not shown to have learnt anything"


def _whatever(frontier: Frontier) -> list[str]:
    return ["Utility has no power here, whatever the caps."] if no_use(frontier) else []


def _with(name: str, value: float, caps: Caps) -> str:
    if name == "leakage":
        more = value - (caps.max_leakage or 0.0)
        return f"With {points(more)} more leakage (a cap of {number(value, 3)})"
    return f"With an epsilon of up to {show_epsilon(value)}"


def _safer(frontier: Frontier, chosen: Case, cases: Sequence[Case], caps: Caps) -> list[str]:
    """What less leakage would cost, where relaxing the utility asked for does not change the choice by itself."""
    if caps.min_utility is None:
        return []
    safer = [c for c in cases if set(misses(c, caps)) == {"utility"} and c.leakage < chosen.leakage]
    if not safer:
        return []
    near = max(safer, key=lambda c: (c.utility, -c.leakage, c.policy))
    less, cost = chosen.leakage - near.leakage, chosen.utility - near.utility
    metric = metric_name(frontier.utility_metric)
    return [
        f"{points(less).capitalize()} less leakage would cost {points(cost)} of {metric}: "
        f"{visible(near.policy)} has both{_but_idle(frontier, near)}."
    ]


def _steady(chosen: Case, caps: Caps, changes: dict[str, float]) -> list[str]:
    """For which leakage caps the choice stays the same."""
    if caps.max_leakage is None:
        return []
    least = number(rounded_up(chosen.leakage), 3)
    if "leakage" not in changes:
        return [f"The choice stays the same for any leakage cap from {least} up."]
    return [f"The choice stays the same for leakage caps from {least} to just under {number(changes['leakage'], 3)}."]


def none_qualifies(cases: Sequence[Case], caps: Caps, metric: str) -> str:
    """That no policy keeps the caps, and which comes nearest."""
    if not cases:
        return "Nothing can be recommended: no policy has all three, leakage, utility and a guarantee."
    start = f"None qualifies: no policy keeps {', '.join(caps.words())}, at the bad end of the intervals."
    near = min(cases, key=lambda c: _farness(c, caps))
    beyond = misses(near, caps)
    told = {
        "leakage": f"leakage of up to {number(rounded_up(near.leakage), 3)} ({_beyond(beyond, 'leakage')} too much)",
        "utility": f"{metric_name(metric)} of only {number(rounded_down(near.utility), 3)} "
        f"({_beyond(beyond, 'utility')} too little)",
        "epsilon": f"epsilon of {show_epsilon(epsilon_up(near.epsilon))}",
    }
    missed = " and ".join(f"its {told[name]}" for name in beyond)
    return f"{start} The nearest miss is {called(near.policy)}, for {missed}.{_too_few(near, beyond, caps)}"


def _beyond(beyond: Mapping[str, float], name: str) -> str:
    """By how much a cap is broken."""
    by = beyond.get(name, 0.0)
    return number(by, 3) if by >= 0.0005 else "less than 0.001"


def _farness(case: Case, caps: Caps) -> tuple[float | str, ...]:
    """How far a case is from keeping the caps; of those as far as each other the one of highest utility comes first."""
    beyond = misses(case, caps)
    return len(beyond), round(sum(beyond.values()), TIE_DIGITS), -case.utility, *case.simplicity, case.policy


def _too_few(case: Case, beyond: Mapping[str, float], caps: Caps) -> str:
    """That the number of targets is what misses the cap, where the mean keeps it."""
    found = case.row.leakage
    if "leakage" not in beyond or found is None or caps.max_leakage is None or found.value > caps.max_leakage:
        return ""
    return f" Its mean is {number(found.value, 3)} on {count(found.n, 'target')}: more of them narrow the interval."


def what_would_admit(frontier: Frontier, cases: Sequence[Case], caps: Caps) -> list[str]:
    """For each cap, the least relaxing of it alone under which some policy qualifies."""
    told: dict[str, str] = {}
    for name, relaxed, _, value in _relaxed(cases, caps):
        shown = show_epsilon(value) if name == "epsilon" else number(value, 3)
        least, best = "at least" if name == "utility" else "at most", choose(fitting(cases, relaxed), relaxed)
        idle = _but_idle(frontier, best)
        told.setdefault(name, f"With {name} {least} {shown}, {called(best.policy)} would be chosen{idle}.")
    return [*told.values(), *(_whatever(frontier) if told else [])]
