"""Which policy to share, under the caps that the user set: decided at the bad end of every interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpguard.report import reasons
from dpguard.report.board import Frontier
from dpguard.report.choice import Caps, Case, choose, fitting
from dpguard.report.text import metric_name, number, visible

__all__ = ["Caps", "Recommendation", "recommend"]

Verdict = Literal["recommended", "none qualifies", "no caps", "no power", "no control", "bound broken"]

EXACT = metric_name("exact_match")
POWER = 0.5
"""The undefended control must leak at least this much of the metric, or the attack proves nothing."""
LEAD = 0.2
"""And this much more than the prior attack, which sees no message."""


@dataclass(frozen=True)
class Recommendation:
    """The decision, in words.

    Attributes:
        verdict: what kind of answer this is; a policy is named only for "recommended".
        sentence: the answer, with the caution where there is one.
        policy: the recommended policy, or empty.
        why: the caps and how far from each the policy is, and who else qualified.
        limits: what it does not protect.
        sensitivity: what relaxing a cap would gain.
        caps: the caps it was decided under.
        caution: why what is chosen may be worth nothing; else empty.
    """

    verdict: Verdict
    sentence: str
    policy: str = ""
    why: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    sensitivity: tuple[str, ...] = ()
    caps: Caps = field(default_factory=Caps)
    caution: str = ""

    @property
    def answer(self) -> str:
        """The sentence without the caution."""
        return self.sentence.removesuffix(self.caution).rstrip()


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
    to three digits are a tie, which goes to the simpler table: fewer rows, then fewer columns. With neither a leakage
    nor an epsilon cap, the undefended control would always win: then the least leaking policy of sufficient utility
    is chosen. Where a policy gave away more than its guarantee allows, or the undefended control was not recovered,
    nothing is recommended.

    Args:
        frontier: of the study.
        max_leakage: cap on leakage, in [0, 1].
        min_utility: least utility.
        max_epsilon: cap on epsilon.

    Raises:
        UserError: a cap out of range.
    """
    caps = Caps(max_leakage, min_utility, max_epsilon)
    if stopped := broken(frontier) or no_power(frontier):
        verdict, sentence = stopped
        return Recommendation(verdict, sentence, caps=caps)
    cases = [case for row in frontier.rows if (case := Case.of(row))]
    caution = reasons.no_use_of_any(frontier, cases)
    if not caps:
        sentence = "No caps were set, so no policy is recommended: the frontier below is the answer."
        return Recommendation("no caps", _with(sentence, caution), caps=caps, caution=caution)
    fit = fitting(cases, caps)
    if not fit:
        return Recommendation(
            "none qualifies",
            _with(reasons.none_qualifies(cases, caps, frontier.utility_metric), caution),
            why=tuple(reasons.unmeasured(frontier)),
            sensitivity=tuple(reasons.what_would_admit(frontier, cases, caps)),
            caps=caps,
            caution=caution,
        )
    chosen = choose(fit, caps)
    caution = reasons.caution(frontier, chosen)
    return Recommendation(
        "recommended",
        _with(reasons.answer(frontier, chosen), caution),
        chosen.policy,
        tuple(reasons.why(frontier, chosen, fit, caps)),
        tuple(reasons.limits(frontier, chosen.row)),
        tuple(reasons.sensitivity(frontier, chosen, cases, caps)),
        caps,
        caution,
    )


def _with(sentence: str, caution: str) -> str:
    return f"{sentence} {caution}" if caution else sentence


def moved_cap(spec: Mapping[str, Any], metric: str, caps: Caps) -> str:
    """What is to be said where the study's cap on leakage was set for another metric than this report's; else ""."""
    meant = str((spec.get("leakage") or {}).get("metric") or "rougeL")
    if caps.max_leakage is None or metric == meant:
        return ""
    return (
        f"The cap on leakage, {caps.max_leakage:g}, was set in the study for {metric_name(meant)}; here it is applied "
        f"to {metric_name(metric)}, which was picked for this report."
    )


def broken(frontier: Frontier) -> tuple[Verdict, str] | None:
    """Why nothing can be relied on when a policy gave away more than its guarantee allows; else None."""
    names = [visible(row.policy, limit=60) for row in frontier.rows if row.broken]
    if not names:
        return None
    them = "it" if len(names) == 1 else "them"
    return "bound broken", (
        f"Nothing is recommended: {', '.join(names)} gave away more than the guarantee allows, so the noise, the "
        f"accounting, the attack or the chance that the bound starts from is wrong, perhaps not for {them} alone."
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
    reached, guess, name = control.leakage, floor.value, metric_name(frontier.leakage_metric)
    if control.candidates:  # chance is known of naming the text whole, and of nothing else
        exact = control.measures["exact_match"]
        reached, guess, name = (
            exact.measured,
            max(exact.chance or 0.0, exact.floor.value if exact.floor else 0.0),
            EXACT,
        )
    if reached.value >= POWER and reached.value - guess >= LEAD and reached.low > guess:
        return None
    if reached.value >= POWER and reached.value - guess >= LEAD:
        return "no power", (
            f"Too few texts to conclude anything: without any protection the attack reached {number(reached.value)} "
            f"{name} on {reached.n} of them, and from so few it may be as low as {number(reached.low)}, where a guess "
            f"that sees no message reaches {number(guess)}; raise leakage.targets."
        )
    return "no power", (
        f"This attack has no power here; nothing can be concluded. Without any protection it reached "
        f"{number(reached.value)} {name}, where a guess that sees no message reaches {number(guess)}."
    )
