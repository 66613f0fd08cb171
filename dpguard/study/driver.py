"""The one process that decides what runs next and writes to the store. No torch here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.cache import Cache
from dpguard.study.executor import Executor
from dpguard.study.grid import NEEDS, describe
from dpguard.study.interrupts import Interrupts
from dpguard.study.journal import FINISHED, INTERRUPTED, Journal, Running
from dpguard.study.progress import Event
from dpguard.study.record import Cell, Record, TextRow
from dpguard.study.remaining import Pace, kind
from dpguard.study.store import Store
from dpguard.study.todo import WAITED

_LOOK = 5.0  # seconds between looks at the study's files
_SHARE = 0.02  # of the time may go into computing the best point


class Driver:
    """Runs cells through an executor and stores what they leave.

    Args:
        store: open for writing.
        todo: those to run.
        executor: makes what runs them.
        interrupts: Ctrl-C so far.
        files: the study's files as they were read: path -> text.

    Attributes:
        finished: cell id -> record, of this run.
        provenance: what every record says besides what its worker knew.
        listeners, say, best, ended: see `runner.run`.
    """

    def __init__(
        self,
        store: Store,
        todo: Sequence[Cell],
        executor: Callable[[], Executor],
        interrupts: Interrupts,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store
        self.make_executor = executor
        self.interrupts = interrupts
        self.listeners: list[Callable[[Event], None]] = []
        self.say: Callable[[str], None] = print
        self.ended = FINISHED
        self.best: Callable[[Store], str] | None = None
        self.provenance: dict[str, Any] = {}
        self.total = len(todo)
        self.pending = {cell.id: cell for cell in todo}
        self.running: dict[str, Running] = {}
        self.finished: dict[str, Record] = {}
        self._failed = 0
        self._left = Counter(kind(cell) for cell in todo)
        self._kinds = {cell.id: kind(cell) for cell in todo}
        self._journal = Journal()
        self._pace = Pace()
        self._best_at = 0.0
        self._files = {path: text for path, text in (files or {}).items() if _reads(path) is not None}
        self._looked = time.monotonic()

    def drive(self) -> None:
        """Run until nothing is left, or until interrupted."""
        if not self.pending:
            return
        self._look_at_files(at_once=True)  # it may have changed while model and texts were read
        executor, ended = self.make_executor(), "error"
        try:
            self._drive(executor)
            ended = INTERRUPTED if self.pending or self.running else self.ended
        except UserError as error:
            ended = str(error)
            raise
        finally:
            executor.close()
            self.running.clear()
            self._note(executor, ended)
        self._look_at_files(at_once=True)

    def _drive(self, executor: Executor) -> None:
        announced = False
        while self.pending or self.running:
            if self.interrupts.count == 0:
                self._launch(executor)
            elif self.interrupts.count > 1 or not self.running:
                return
            elif not announced:
                announced = True
                self.say(f"finishing {len(self.running)} running; Ctrl-C again ends them")
            if self.running:
                self._collect(executor)
            self._look_at_files()

    def _launch(self, executor: Executor) -> None:
        """Fill the free places with the first cells that have what they need."""
        for cell in list(self.pending.values()):
            if len(self.running) >= executor.places:
                return
            needed = cell.settings.get(NEEDS)
            if needed in self.pending or needed in self.running or not executor.takes(cell):
                continue
            del self.pending[cell.id]
            self._left[kind(cell)] -= 1
            reason = self._obstacle(needed)
            if reason:
                self._finish(executor, Record(cell, "skipped", reason, provenance={WAITED: needed}), [])
            else:
                executor.start(cell)
                self.running[cell.id] = Running(cell.id, describe(cell), round(time.time(), 2))
                self._tell(executor, "started", cell, None)

    def _obstacle(self, needed: str | None) -> str:
        """Why a cell cannot run although all that it waits for has ended, or ""."""
        record = None if needed is None else self.finished.get(needed) or self.store.record(needed)
        if record is None or record.status == "done":
            return ""
        verb = "failed" if record.status == "failed" else "was skipped"
        return f"it attacks the weights of {describe(record.cell)}, which {verb}: {record.reason}"

    def _collect(self, executor: Executor) -> None:
        """Wait until a cell ends or Ctrl-C comes, and store what ended."""
        answers = executor.wait(self.interrupts.wake, _LOOK)
        self.interrupts.clear()
        if not answers:
            self._note(executor, "")
        for record, texts in answers:
            del self.running[record.cell.id]
            self._finish(executor, record, texts)

    def _finish(self, executor: Executor, record: Record, texts: Sequence[TextRow]) -> None:
        record = replace(record, provenance={**self.provenance, "seed": record.cell.seed, **record.provenance})
        try:
            self.store.put(record, texts)
        except UserError:
            # A full disk, most likely. What is cached can be made again, a record must not be lost.
            if not Cache(self.store.folder).clear():
                raise
            self.store.put(record, texts)
        self.finished[record.cell.id] = record
        self._failed += record.status == "failed"
        self._pace.add(record)
        self._tell(executor, "finished", record.cell, record)

    def _tell(self, executor: Executor, what: Any, cell: Cell, record: Record | None) -> None:
        if record is not None:
            self._find_best()
        self._note(executor, "")
        event = Event(
            what, cell, record, len(self.finished), self.total, tuple(self.running.values()),
            failed=self._failed, remaining=self._journal.remaining, best=self._journal.best,
        )  # fmt: skip
        for listener in self.listeners:
            listener(event)

    def _find_best(self) -> None:
        """Ask for the best point when that has become worth its time."""
        if self.best is None or time.monotonic() < self._best_at:
            return
        started = time.monotonic()
        self._journal = replace(self._journal, best=self.best(self.store))
        self._best_at = time.monotonic() + (time.monotonic() - started) / _SHARE

    def _note(self, executor: Executor, ended: str) -> None:
        """Leave word for ``dpguard status``."""
        at = time.time()
        running = [(self._kinds[one.id], at - one.since) for one in self.running.values()]
        self._journal = replace(
            self._journal,
            workers=executor.places,
            running=tuple(self.running.values()),
            at=round(at, 2),
            remaining=self._pace.seconds(+self._left, running, places=executor.places),
            ended=ended,
        )
        self._journal.write(self.store.folder)

    def _look_at_files(self, *, at_once: bool = False) -> None:
        """Say, once, that a file of the study is not what this run was planned from."""
        if not at_once and time.monotonic() < self._looked + _LOOK:
            return
        self._looked = time.monotonic()
        for path, text in list(self._files.items()):
            if _reads(path) != text:
                del self._files[path]
                self.say(
                    f"{path} has changed since this run was planned: the run goes on as planned, nothing is lost; "
                    "run the same command again for what is new"
                )


def _reads(path: str) -> str | None:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
