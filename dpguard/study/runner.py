"""Runs the cells of a study: one driver that stores, one process a cell, and nothing lost on the way.

The driver imports no numeric library; ``execute`` is named, not imported, and runs where the executor puts it
(`executor.Executor`; worker processes of this machine unless another one is given).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dpguard.errors import UserError
from dpguard.study.executor import Executor, Limits
from dpguard.study.grid import NEEDS, describe
from dpguard.study.progress import Display, Event
from dpguard.study.record import Cell, Record, TextRow
from dpguard.study.spec import Study
from dpguard.study.store import Store
from dpguard.study.workers import Workers, warm_up

INTERRUPTED = 130


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        planned: cells of the study.
        resumed: cells that an earlier run had finished.
        done, failed, skipped: cells of this run, by status.
        ignored: stored records that the study no longer plans.
        interrupted: it was stopped before the end.
        failures: what failed, in words: (cell, reason).
    """

    planned: int
    resumed: int
    done: int
    failed: int
    skipped: int
    ignored: int
    interrupted: bool
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def exit_status(self) -> int:
        """130 when interrupted, 1 when a cell failed, else 0."""
        return INTERRUPTED if self.interrupted else int(self.failed > 0)

    @property
    def sentence(self) -> str:
        """The run in one sentence, with what to do next.

        >>> Summary(5, 2, 1, 0, 0, 0, True).sentence
        'stopped: 3 of 5 cells are finished; run the same command again to go on from there'
        """
        stored = self.resumed + self.done + self.skipped
        if self.interrupted:
            return (
                f"stopped: {stored} of {self.planned} cells are finished; "
                "run the same command again to go on from there"
            )
        parts = [f"{self.done} done"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.resumed} from an earlier run"] if self.resumed else []
        text = f"{self.planned} cells: {', '.join(parts)}"
        if self.ignored:
            text += f"; {self.ignored} stored that the study no longer plans are left aside"
        return text + ("; run the same command again to retry what failed" if self.failed else "")


def run(
    study: Study,
    folder: str | Path,
    cells: Sequence[Cell],
    *,
    execute: str,
    context: Mapping[str, Any] | None = None,
    workers: int | None = None,
    threads: int = 1,
    limits: Limits | None = None,
    executor: Callable[[], Executor] | None = None,
    preload: Sequence[str] = (),
    show_text: bool = False,
    quiet: bool = False,
    on_event: Callable[[Event], None] | None = None,
    only: Collection[str] | None = None,
) -> Summary:
    """Run what the folder's store does not hold yet; every record is on the disk before the next begins.

    Args:
        study: the study; its name is the identity of the folder.
        folder: where the records live.
        cells: what to run, in order; a cell comes after the one that it needs.
        execute: ``module:function`` (or ``file.py:function``) taking (cell, context), giving a record and
            its texts; it is imported in the workers only.
        context: plain data for ``execute`` that changes no result (paths, caches).
        workers: processes side by side; the number of usable cores when None.
        threads: of each worker.
        limits: what a cell may use.
        executor: makes another executor than workers of this machine; called once, if there is anything to run.
            ``workers``, ``threads``, ``limits`` and ``preload`` are then its own business.
        preload: modules that the worker server imports once.
        show_text: whether the report of this folder may show private texts.
        quiet: show nothing.
        on_event: called in the driver whenever a cell starts or finishes.
        only: ids of the cells to run here, one shard's; the store plans all, so that a report knows what is missing.

    Returns:
        The counts, with the exit status. The first Ctrl-C lets running cells finish and starts no other,
        the second ends them.

    Raises:
        UserError: fewer than one worker, another study's folder, another driver in the folder, an
            unreadable store, or no room to write.
    """
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers is {workers}, expected a whole number above 0")
    _check_needs(cells)
    with Store.open(folder, create=True) as store:
        store.set_study(study.name, study.text, study.plain(), cells, show_text=show_text)
        own = [cell for cell in cells if only is None or cell.id in only]
        todo = _todo(own, store.statuses())

        def embedded() -> Executor:
            warm_up(preload, threads)
            return Workers(execute, context or {}, workers, limits=limits, threads=threads)

        with _Interrupts() as interrupts, Display(len(todo), quiet=quiet) as display:
            driver = _Driver(store, todo, executor or embedded, interrupts)
            driver.listeners = [display.show, *([on_event] if on_event else [])]
            driver.say = display.say
            driver.drive()
        return driver.summary(len(own), len(store.ignored()))


def usable_cores() -> int:
    """Cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_needs(cells: Sequence[Cell]) -> None:
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"cell {cell.id} ({describe(cell)}) is planned twice")
        if cell.settings.get(NEEDS, cell.id) not in {*seen, cell.id}:
            raise ValueError(f"cell {cell.id} ({describe(cell)}) comes before the one that it needs")
        seen.add(cell.id)


def _todo(cells: Sequence[Cell], statuses: Mapping[str, str]) -> list[Cell]:
    """Cells without a finished record, and those skipped because of one of them."""
    todo: dict[str, Cell] = {}
    for cell in cells:
        status = statuses.get(cell.id)
        waits = status == "skipped" and cell.settings.get(NEEDS) in todo
        if status not in ("done", "skipped") or waits:
            todo[cell.id] = cell
    return list(todo.values())


class _Driver:
    """The one process that decides what runs next and writes to the store."""

    def __init__(
        self, store: Store, todo: Sequence[Cell], executor: Callable[[], Executor], interrupts: _Interrupts
    ) -> None:
        self.store = store
        self.todo = todo
        self.make_executor = executor
        self.interrupts = interrupts
        self.listeners: list[Callable[[Event], None]] = []
        self.say: Callable[[str], None] = print
        self.pending = {cell.id: cell for cell in todo}
        self.running: dict[str, Cell] = {}
        self.finished: dict[str, Record] = {}

    def drive(self) -> None:
        """Run until nothing is left, or until interrupted."""
        if not self.pending:
            return
        executor = self.make_executor()
        announced = False
        try:
            while self.pending or self.running:
                if self.interrupts.count == 0:
                    self._launch(executor)
                elif self.interrupts.count > 1 or not self.running:
                    break
                elif not announced:
                    announced = True
                    self.say(f"finishing {len(self.running)} running; Ctrl-C again ends them")
                if self.running:
                    self._collect(executor)
        finally:
            executor.close()

    def _launch(self, executor: Executor) -> None:
        """Fill the free places with the first cells that have what they need."""
        for cell in list(self.pending.values()):
            if len(self.running) >= executor.places:
                return
            needed = cell.settings.get(NEEDS)
            if needed in self.pending or needed in self.running:
                continue
            del self.pending[cell.id]
            reason = self._obstacle(needed)
            if reason:
                self._finish(Record(cell, "skipped", reason), [])
            else:
                executor.start(cell)
                self.running[cell.id] = cell
                self._tell("started", cell, None)

    def _obstacle(self, needed: str | None) -> str:
        """Why a cell cannot run although all that it waits for has ended, or ""."""
        record = None if needed is None else self.finished.get(needed) or self.store.record(needed)
        if record is None or record.status == "done":
            return ""
        verb = "failed" if record.status == "failed" else "was skipped"
        return f"it attacks the weights of {describe(record.cell)}, which {verb}: {record.reason}"

    def _collect(self, executor: Executor) -> None:
        """Wait until a cell ends or Ctrl-C comes, and store what ended."""
        answers = executor.wait(self.interrupts.wake)
        self.interrupts.clear()
        for record, texts in answers:
            del self.running[record.cell.id]
            self._finish(record, texts)

    def _finish(self, record: Record, texts: Sequence[TextRow]) -> None:
        self.store.put(record, texts)
        self.finished[record.cell.id] = record
        self._tell("finished", record.cell, record)

    def _tell(self, kind: Any, cell: Cell, record: Record | None) -> None:
        event = Event(kind, cell, record, len(self.finished), len(self.todo), tuple(self.running.values()))
        for listener in self.listeners:
            listener(event)

    def summary(self, planned: int, ignored: int) -> Summary:
        """The counts of this run."""
        statuses = [record.status for record in self.finished.values()]
        return Summary(
            planned=planned,
            resumed=planned - len(self.todo),
            done=statuses.count("done"),
            failed=statuses.count("failed"),
            skipped=statuses.count("skipped"),
            ignored=ignored,
            interrupted=len(self.finished) < len(self.todo),
            failures=tuple(
                (describe(record.cell), record.reason) for record in self.finished.values() if record.status == "failed"
            ),
        )


class _Interrupts:
    """Counts Ctrl-C instead of raising in the middle of a write, and wakes up whoever waits on ``wake``."""

    def __init__(self) -> None:
        self.count = 0
        self.wake, self._ring = os.pipe()
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        # Only the main thread may handle signals; elsewhere Ctrl-C is that thread's business.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        os.close(self.wake)
        os.close(self._ring)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._ring, b"!")

    def clear(self) -> None:
        """Take what has rung so far off the pipe."""
        while wait([self.wake], timeout=0):
            os.read(self.wake, 64)
