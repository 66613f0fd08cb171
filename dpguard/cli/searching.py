"""Runs a study whose sweeps look for values: run, look at what was measured, add the next value, run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpguard.study.journal import FINISHED, mark
from dpguard.study.record import Record
from dpguard.study.search import advance, searches
from dpguard.study.spec import Study
from dpguard.study.store import Store
from dpguard.study.summary import Summary

if TYPE_CHECKING:
    from dpguard.cli.planning import Planned


@dataclass(frozen=True)
class Settled:
    """A study with every value that its records ask for.

    Attributes:
        study: as read, with those values.
        planned: the study's plan.
        sentences: how its searches stand, one each that has ended.
    """

    study: Study
    planned: Planned
    sentences: tuple[str, ...]


def settle(study: Study, folder: Path, plan: Callable[[Study], Planned]) -> Settled:
    """Replay the searches of a study over the records that its folder holds, until they ask for something new.

    Args:
        study: as read, with the values that are known to have been tried.
        folder: of its records, which need not exist.
        plan: gives the plan of a study; called once for every value.
    """
    planned = plan(study)
    records = _records(folder) if searches(study) else {}
    while True:
        now = advance(study, planned.cells, records)
        if not now.grown:
            notes = tuple(named.note for named in planned.study.policies if named.note)
            return Settled(study, planned, (*notes, *now.sentences))
        study = now.study
        planned = plan(study)


def run(
    study: Study, folder: Path, plan: Callable[[Study], Planned], go: Callable[[Planned, Store, bool], Summary]
) -> tuple[Settled, Summary]:
    """Run a study until no search asks for another value, or until interrupted; the folder is held all the while.

    Args:
        study, folder, plan: as for `settle`.
        go: runs a plan, with the store open for writing; the flag says whether it is the first of several runs.
    """
    settled = settle(study, folder, plan)
    with Store.open(folder, create=True) as store:
        total = go(settled.planned, store, True)
        while searches(study) and not total.interrupted:
            after = settle(settled.study, folder, plan)
            if len(after.study.policies) == len(settled.study.policies):
                mark(folder, FINISHED)
                return after, total
            if total.stopped:
                return settled, replace(total, interrupted=True)
            settled = after
            total = _sum(total, go(settled.planned, store, False), settled.planned, store)
    return settled, total


def _sum(first: Summary, later: Summary, planned: Planned, store: Store) -> Summary:
    """Two runs as one: what ran in both counts once, as it ended."""
    ran, took = first.ran | later.ran, first.took | later.took
    return Summary.of(
        planned.cells, store, ran, took, interrupted=later.interrupted, stopped=later.stopped, reused=first.reused
    )


def _records(folder: Path) -> Mapping[str, Record]:
    """Every record of a folder, those that an earlier plan left among them."""
    if not Store.begun(folder):
        return {}
    with Store.open(folder) as store:
        return {record.cell.id: record for record in (*store.records(), *store.ignored())}
