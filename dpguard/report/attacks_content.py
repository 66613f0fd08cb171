"""What each attack got from the same messages, policy by policy, as data: which ones a defence stops, and which not."""

from __future__ import annotations

from dataclasses import dataclass

from dpguard.report.board import FLOOR, Answer, Frontier
from dpguard.report.text import metric_name

LISTED = 30
"""With more policies than this there is no such picture."""
LEAST = 2
"""With fewer attacks than this that read a message there is nothing to compare."""


@dataclass(frozen=True)
class Attacks:
    """A grid of policies and attacks.

    Attributes:
        policies: (number in the frontier table, name), in the study's order.
        attacks: in the order in which they ran.
        answers: (policy, attack) -> what it got; without an entry the attack could not use the message.
        whole: policies whose leakage was measured in full.
        metric: in words.
    """

    policies: tuple[tuple[int, str], ...]
    attacks: tuple[str, ...]
    answers: dict[tuple[str, str], Answer]
    whole: frozenset[str]
    metric: str


def attacks_content(frontier: Frontier) -> Attacks | None:
    """Compute the grid; None with fewer than `LEAST` attacks that read messages, or with too many policies."""
    metric = frontier.leakage_metric
    answers = {
        (row.policy, attack): answer
        for row in frontier.rows
        if (measure := row.measures.get(metric))
        for attack, answer in measure.answers.items()
    }
    attacks = _in_order([list(row.attacks) for row in frontier.rows])
    if len(frontier.rows) > LISTED or len(set(attacks) - {FLOOR}) < LEAST or not answers:
        return None
    policies = tuple((number, row.policy) for number, row in enumerate(frontier.rows, 1))
    whole = frozenset(policy for policy, _ in answers)
    return Attacks(policies, tuple(attacks), answers, whole, metric_name(metric))


def _in_order(runs: list[list[str]]) -> list[str]:
    """One order of all attacks, by the longest runs first: others go before the next one of their run that is there.

    >>> _in_order([["prior", "span"], ["prior", "rows", "span"], ["prior", "span", "combined"]])
    ['prior', 'rows', 'span', 'combined']
    """
    order: list[str] = []
    for run in sorted(runs, key=len, reverse=True):
        for place, attack in enumerate(run):
            if attack not in order:
                after = [order.index(other) for other in run[place:] if other in order]
                order.insert(min(after, default=len(order)), attack)
    return order
