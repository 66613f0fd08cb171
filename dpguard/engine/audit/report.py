"""What an audit hands back: one row a check, with its figure, and whether every row holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "not applicable"]

CHECKS = {
    "S": "sensitivity",
    "N": "noise law",
    "E": "empty and other batches",
    "W": "what leaves",
    "P": "Poisson sampling",
    "A": "claims",
    "D": "two worlds",
}
"""Letter of a check -> what it is about."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: its letter, see `CHECKS`.
        what: what was looked at.
        figure: what was found; where a check does not apply, the reason.
        claim: what the policy claims, "" where a check does not apply.
        verdict: ``pass``, ``fail`` or ``not applicable``.
    """

    check: str
    what: str
    figure: str
    claim: str
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """An audit.

    Attributes:
        policy: name of the policy.
        model: name of the model whose slots it was resolved against, "" when only slots were given.
        seed: the audit's seed; the same seed gives the same report.
        rows: the checks, in the order of `CHECKS`.
    """

    policy: str
    model: str
    seed: int
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True when no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == "fail")

    def as_plain(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "policy": self.policy,
            "model": self.model,
            "seed": self.seed,
            "ok": self.ok,
            "rows": [vars(row) for row in self.rows],
        }


Step = Callable[[], list[Row]]
"""Some checks; no step depends on another."""


def judged(check: str, what: str, figure: str, claim: str, holds: bool) -> Row:
    """A row that passes when ``holds``.

    >>> judged("N", "kurtosis", "1.80", "3", False).verdict
    'fail'
    """
    return Row(check, what, figure, claim, "pass" if holds else "fail")


def not_applicable(check: str, what: str, reason: str) -> Row:
    """A row for a check that does not apply, with its reason."""
    return Row(check, what, reason, "", "not applicable")


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "group"), counted(1200, "tensor")
    ('1 group', '1,200 tensors')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
