"""Policies whose value is looked for: what the records say of it, and which value comes next. No torch here.

Every value that is tried is an ordinary policy with ordinary cells, so resuming, reports and records need nothing else.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dpguard.policy.auto import Measured, step
from dpguard.study.record import Cell, Record

if TYPE_CHECKING:
    from dpguard.study.policies import Named, Search
    from dpguard.study.spec import Study


@dataclass(frozen=True)
class Advance:
    """Where the searches of a study stand.

    Attributes:
        study: with the values to try next among its policies.
        grown: whether there are any new ones.
        sentences: how searches ended, one each; shown as they are.
    """

    study: Study
    grown: bool
    sentences: tuple[str, ...]


def advance(study: Study, cells: Sequence[Cell], records: Mapping[str, Record]) -> Advance:
    """Look at the records of every search, and add what is to be tried next.

    Args:
        study: with the values tried so far; as read, before it is calibrated.
        cells: its cells.
        records: cell id -> record, of those that have one.
    """
    policies, sentences = list(study.policies), []
    for search in searches(study):
        own = [named for named in policies if named.search is search]
        measured = {}
        for named in own:
            found = _measured(study, search, [cell for cell in cells if cell.policy == named.label], records)
            if found is not None:
                measured[float(named.values[search.auto.variable])] = found
        now = step(search.auto, measured)
        known = {float(named.values[search.auto.variable]) for named in own}
        policies += [search.named(value) for value in now.ask if value not in known]
        if now.sentence:
            sentences.append(f"{search.label}: {now.sentence}")
    grown = len(policies) > len(study.policies)
    return Advance(replace(study, policies=_in_order(study, policies)) if grown else study, grown, tuple(sentences))


def searches(study: Study) -> list[Search]:
    """What is looked for by measuring, in the study's order."""
    found = [named.search for named in study.policies if named.search and not named.search.auto.computed]
    return list({id(search): search for search in found}.values())


def chosen(study: Study, labels: Sequence[str]) -> Study:
    """The study with the tried values that these labels name, and nothing to look for by measuring any more."""
    policies = list(study.policies)
    for search in searches(study):
        known = {named.label for named in policies}
        for label in set(labels) - known:
            value = dict(part.split("=", 1) for part in label.split() if "=" in part).get(search.auto.variable, "")
            with contextlib.suppress(ValueError):
                named = search.named(float(value))
                policies += [named] if named.label == label else []
    ordered = _in_order(study, policies)
    stay = [replace(n, search=None) if n.search and not n.search.auto.computed else n for n in ordered]
    return replace(study, policies=tuple(stay))


def _in_order(study: Study, policies: Sequence[Named]) -> tuple[Named, ...]:
    """Values of one search beside each other, in rising order, where the study's file has them."""
    places = {id(named.search): place for place, named in reversed(list(enumerate(study.policies))) if named.search}

    def key(item: tuple[int, Named]) -> tuple[int, float]:
        place, named = item
        if named.search is None:
            return place, 0.0
        return places[id(named.search)], float(named.values.get(named.search.auto.variable, 0.0))

    return tuple(named for _, named in sorted(enumerate(policies), key=key))


def _measured(study: Study, search: Search, cells: Sequence[Cell], records: Mapping[str, Record]) -> Measured | None:
    """What one policy's cells of the target's leg say together; None while one of them has not run."""
    own = [cell for cell in cells if cell.leg == search.auto.target]
    found = [records[cell.id] for cell in own if cell.id in records]
    for record in found:
        if record.status != "done":
            return Measured(reason=record.reason or record.status)
    if len(found) < len(own) or not own:
        return None
    if search.auto.target == "leakage":
        return _leakage(found, str(study.leakage and study.leakage.metric))
    metric = str(study.utility and study.utility.metric)
    return Measured(sum(float(record.result["metrics"][metric]) for record in found) / len(found))


def _leakage(found: Sequence[Record], metric: str) -> Measured:
    """The largest mean over targets and seeds that any attack reached at any position: what the report leads with."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in found:
        for score in record.result["scores"]:
            if score["metrics"].get(metric) is not None:
                scores[str(score["attack"]), str(record.cell.settings.get("at"))].append(score["metrics"][metric])
    if not scores:
        return Measured(reason=f"no attack has the metric {metric!r}")
    return Measured(max(sum(values) / len(values) for values in scores.values()))
