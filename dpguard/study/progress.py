"""What a running study says: a live table with the time remaining on a terminal, else one line a finished cell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpguard.study.grid import describe
from dpguard.study.journal import Running
from dpguard.study.record import Cell, Record
from dpguard.study.remaining import words

_SHOWN = 8  # running cells; a cluster runs hundreds


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell.

    Attributes:
        kind: ``started`` or ``finished``.
        cell: the cell.
        record: what it left, None when it has only started.
        finished, total: cells of this run.
        running: what runs now, oldest first.
        failed: of the finished ones.
        remaining: seconds until all is done, as expected; None = nothing known yet.
        best: the best point so far, in a sentence; "" = none yet.
    """

    kind: Literal["started", "finished"]
    cell: Cell
    record: Record | None
    finished: int
    total: int
    running: tuple[Running, ...] = ()
    failed: int = 0
    remaining: float | None = None
    best: str = ""


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


def picture(
    *,
    finished: int,
    failed: int,
    total: int,
    running: Sequence[Running],
    remaining: float | None,
    best: str,
    skipped: int = 0,
    over: bool = False,
    at: float | None = None,
) -> RenderableType:
    """The table of a study that runs, never wider than the terminal.

    Args:
        finished, failed: cells with a record, and how many of those failed.
        total: cells.
        running: what runs, oldest first.
        remaining: seconds, None = unknown.
        best: the best point so far.
        skipped: cells with a record that says so.
        over: nothing runs any more.
        at: now, seconds of the epoch.
    """
    at = time.time() if at is None else at
    left = max(0, total - finished - len(running))
    counts = Text(no_wrap=True, overflow="ellipsis")
    counts.append(f"{finished - failed - skipped} done", "green")
    counts.append(f" · {skipped} skipped" if skipped else "")
    counts.append(f" · {failed} failed", "bold red" if failed else "dim")
    counts.append(f" · {len(running)} running · {left} left")
    if not over:
        counts.append(" · time remaining: " + ("not known yet" if remaining is None else f"about {words(remaining)}"))
    cells = Table.grid(padding=(0, 2, 0, 0), expand=True)
    cells.add_column(width=9, no_wrap=True)
    cells.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    cells.add_column(justify="right", no_wrap=True)
    for number, one in enumerate(running[:_SHOWN]):
        cells.add_row("" if number else "running", Text(one.words), words(at - one.since))
    if len(running) > _SHOWN:
        cells.add_row("", f"and {len(running) - _SHOWN} more", "")
    bar = Table.grid(expand=True)  # a bar alone would not end its line
    bar.add_row(ProgressBar(total=max(1, total), completed=finished))
    shown: list[RenderableType] = [counts, bar, *([cells] if running else [])]
    return Group(*shown, *([Text(f"best {'point' if over else 'so far'}: {best}", style="dim")] if best else []))


class Display:
    """Shows events on stderr; a context manager."""

    def __init__(self, total: int, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.total = total
        self._last: Event | None = None
        self._at = time.time()
        self._live: Live | None = None
        if self.console.is_terminal and not quiet and total:
            self._live = Live(get_renderable=self._picture, console=self.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def _picture(self) -> RenderableType:
        last = self._last
        if last is None:
            return Text(f"starting {self.total} cells")
        remaining = None if last.remaining is None else max(0.0, last.remaining - (time.time() - self._at))
        return picture(
            finished=last.finished, failed=last.failed, total=last.total, running=last.running,
            remaining=remaining, best=last.best,
        )  # fmt: skip

    def show(self, event: Event) -> None:
        """Move the table; say a finished cell in a line where there is none, and a failed one always."""
        self._last, self._at = event, time.time()
        if event.record is not None and (self._live is None or event.record.status == "failed"):
            self.say(line(event))

    def say(self, sentence: str) -> None:
        """One line, as it is."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
