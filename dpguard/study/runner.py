"""Runs the cells of a study: one driver that stores, one process a cell, and nothing lost on the way.

The driver imports no numeric library; ``execute`` is named, not imported, and runs where the executor puts it
(`executor.Executor`; worker processes of this machine unless another one is given).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study import provenance
from dpguard.study.cache import Cache
from dpguard.study.driver import Driver
from dpguard.study.executor import Executor, Limits
from dpguard.study.grid import NEEDS, describe
from dpguard.study.interrupts import Interrupts
from dpguard.study.journal import FINISHED, SEARCHING, kept
from dpguard.study.progress import Display, Event
from dpguard.study.record import Cell
from dpguard.study.reuse import take, take_weights
from dpguard.study.search import searches
from dpguard.study.spec import Study
from dpguard.study.store import Store
from dpguard.study.summary import Summary
from dpguard.study.todo import Todo
from dpguard.study.workers import Workers, warm_up


def run(
    study: Study,
    folder: str | Path,
    cells: Sequence[Cell],
    *,
    execute: str,
    context: Mapping[str, Any] | None = None,
    workers: int | None = None,
    threads: int = 1,
    devices: Sequence[str] = (),
    executor: Callable[[], Executor] | None = None,
    preload: Sequence[str] = (),
    retry_failed: bool = False,
    show_text: bool = False,
    quiet: bool = False,
    best: Callable[[Store], str] | None = None,
    on_event: Callable[[Event], None] | None = None,
    only: Collection[str] | None = None,
    reuse: Sequence[Path] = (),
    held: Store | None = None,
) -> Summary:
    """Run what the folder's store does not hold yet; every record is on the disk before the next begins.

    A record that says ``failed`` stays as it is, unless its cell was ended from outside (`todo.AGAIN`): that is missing
    work, as if it had never run.

    Args:
        study: the study; its name is the identity of the folder, its limits are the cells'.
        folder: where the records live.
        cells: what to run, in order; a cell comes after the one that it needs.
        execute: ``module:function`` (or ``file.py:function``) taking (cell, context), giving a record and
            its texts; it is imported in the workers only.
        context: plain data for ``execute`` that changes no result (paths, caches).
        workers: processes side by side; the number of usable cores over ``threads`` when None.
        threads: of each worker.
        devices: CUDA devices, as in CUDA_VISIBLE_DEVICES; when there are any, each running training cell has one of
            its own (`devices.takes_device`).
        executor: makes another executor than workers of this machine; called once, if there is anything to run.
            ``workers``, ``threads``, ``devices``, ``preload`` and the study's limits are then its own business.
        preload: modules that the worker server imports once.
        retry_failed: run all failed cells again.
        show_text: whether the report of this folder may show private texts.
        quiet: show nothing.
        best: says the best point so far in a sentence, "" while there is none; called now and then.
        on_event: called in the driver whenever a cell starts or finishes.
        only: ids of the cells to run here, one shard's; the store plans all, so that a report knows what is missing.
        reuse: folders of other studies, whose answers to the same cells are taken over (`reuse.take`).
        held: the folder's store when the caller has it open for writing; it stays open.

    Returns:
        The counts, with the exit status. The first Ctrl-C lets running cells finish and starts no other,
        the second ends them.

    Raises:
        UserError: fewer than one worker, another study's folder, another driver in the folder, an unreadable store
            (also one to reuse), or no room to write.
    """
    if threads < 1:
        raise UserError(f"threads is {threads}, expected a whole number above 0")
    check_workers(workers)
    places = max(1, usable_cores() // threads) if workers is None else workers
    _check_needs(cells)
    ended = SEARCHING if searches(study) else FINISHED

    def embedded() -> Executor:
        warm_up(preload, threads)
        return Workers(execute, context or {}, places, limits=limits_of(study), threads=threads, devices=devices)

    with contextlib.nullcontext(held) if held else Store.open(folder, create=True) as store:
        store.set_study(study.name, study.text, study.plain(), cells, show_text=show_text)
        with kept(folder, ended):
            Cache(folder).tidy()
            own = [cell for cell in cells if only is None or cell.id in only]
            taken = take(store, own, reuse, show_text=show_text)
            take_weights({**(context or {}), "folder": folder}, taken, reuse)
            todo = Todo.of(own, store, retry_failed=retry_failed)
            with Interrupts() as interrupts, Display(len(todo.cells), quiet=quiet) as display:
                driver = Driver(store, todo.cells, executor or embedded, interrupts, files=study.files)
                driver.provenance = provenance.of_run(study.document.path) if todo.cells else {}
                driver.listeners = [display.show, *([on_event] if on_event else [])]
                driver.say, driver.best, driver.ended = display.say, best, ended
                driver.drive()
        unfinished = len(driver.finished) < len(todo.cells)
        return Summary.of(
            own, store, driver.finished.keys(), taken, interrupted=unfinished, stopped=interrupts.count > 0,
            reused=[str(folder) for folder in reuse],
        )  # fmt: skip


def limits_of(study: Study) -> Limits:
    """The limits of a study's cells."""
    return Limits(study.limits.minutes, study.limits.gigabytes)


def usable_cores() -> int:
    """Cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int | None) -> None:
    """Refuse a number of processes that can do nothing.

    Raises:
        UserError: below 1.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, expected a whole number above 0")


def _check_needs(cells: Sequence[Cell]) -> None:
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"cell {cell.id} ({describe(cell)}) is planned twice")
        if NEEDS in cell.settings and cell.settings[NEEDS] not in seen:
            raise ValueError(f"cell {cell.id} ({describe(cell)}) comes before the one that it needs")
        seen.add(cell.id)
