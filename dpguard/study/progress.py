"""What a running study says: a bar with the time remaining on a terminal, else one line a finished cell."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpguard.study.grid import describe
from dpguard.study.record import Cell, Record


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell.

    Attributes:
        kind: ``started`` or ``finished``.
        cell: the cell.
        record: what it left, None when it has only started.
        finished, total: cells of this run.
        running: cells that run now, oldest first.
    """

    kind: Literal["started", "finished"]
    cell: Cell
    record: Record | None
    finished: int
    total: int
    running: tuple[Cell, ...] = ()


def line(event: Event) -> str:
    """One quiet line about a finished cell."""
    record = event.record
    if record is None:
        return f"started {describe(event.cell)}"
    seconds = record.provenance.get("seconds")
    took = f" ({seconds:.1f} s)" if isinstance(seconds, int | float) else ""
    reason = f": {' '.join(record.reason.split())}" if record.reason else ""
    width = len(str(event.total))
    return f"[{event.finished:{width}}/{event.total}] {record.status:<7} {describe(event.cell)}{took}{reason}"


class Display:
    """Shows events on stderr; a context manager."""

    def __init__(self, total: int, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            speed_estimate_period=3600,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Move the bar; say a finished cell in a line where there is no bar, and a failed one always."""
        running = "; ".join(describe(cell) for cell in event.running)
        self._bar.update(self._task, completed=event.finished, description=running)
        if event.record is None:
            return
        if not self.console.is_terminal or event.record.status == "failed":
            self.say(line(event))

    def say(self, sentence: str) -> None:
        """One line, as it is."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
