"""The order of policies in a report: that of the study file, whatever order the cells finished in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpguard.report.result import StudyResult


def policy_order(result: StudyResult) -> list[str]:
    """Names of all policies: the control first, then as in the study file, sweeps in the order of their values.

    A policy of the study file that left no record is listed all the same.
    """
    found = {record.cell.policy for record in result.records}
    policies = result.spec.get("policies") or {}
    bases = list(policies) if isinstance(policies, Mapping | list) else []
    bases = [base for base in bases if isinstance(base, str)]
    sweeps = {base: _sweep(policies[base]) if isinstance(policies, Mapping) else {} for base in bases}
    seen_bases = {base: _base(base, bases) for base in found}
    lost = [base for base in bases if base not in seen_bases.values() and base not in found]
    names = found | set(lost)

    def key(name: str) -> tuple[Any, ...]:
        base = _base(name, bases)
        place = bases.index(base) if base is not None else len(bases)
        rest = name[len(base) :] if base is not None else name
        return (name != "none", place, _values(rest, sweeps.get(base or "", {})), natural(name))

    return sorted(names, key=key)


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which numbers inside a text sort as numbers.

    >>> sorted(["noise=10.0", "noise=2.0"], key=natural)
    ['noise=2.0', 'noise=10.0']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(1, float(part), part) if number % 2 else (0, 0.0, part) for number, part in enumerate(parts)]


def _base(name: str, bases: Iterable[str]) -> str | None:
    fits = [base for base in bases if name == base or name.startswith(base + " ")]
    return max(fits, key=len, default=None)


def _sweep(policy: Any) -> Mapping[str, Any]:
    sweep = policy.get("sweep") if isinstance(policy, Mapping) else None
    return sweep if isinstance(sweep, Mapping) else {}


def _values(rest: str, sweep: Mapping[str, Any]) -> tuple[int, ...]:
    """Index of every sweep value named in ``noise=0.6 clip=1.0``; unknown values last."""
    told = dict(part.partition("=")[::2] for part in rest.split() if "=" in part)
    places = []
    for variable, values in sweep.items():
        written = [str(value) for value in values]
        places.append(written.index(told[variable]) if told.get(variable) in written else len(written))
    return tuple(places)
