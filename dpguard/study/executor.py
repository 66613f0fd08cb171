"""What runs cells, as the driver sees it: the seam between what runs next (`runner`) and where it runs. No torch here.

`workers.Workers` is the embedded one (a process a cell on this machine); another engine is another file with a class
of these methods, handed to `runner.run` by a function that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dpguard.study.record import Cell, Record, TextRow

Answer = tuple[Record, list[TextRow]]


@dataclass(frozen=True)
class Limits:
    """What a cell may use; None = no limit. No part of a cell's id, because they change no result.

    Attributes:
        minutes: from its start to its end.
        gigabytes: of resident memory (10^9 bytes), with the processes that it started.
    """

    minutes: float | None = None
    gigabytes: float | None = None

    def late(self, seconds: float) -> str:
        """Why a cell that has run so long is ended, or "".

        >>> Limits(minutes=0.5).late(31.2)
        'ended by its time limit: 0.5 minutes allowed (limits.minutes), 0.52 used'
        """
        if self.minutes is None or seconds <= 60 * self.minutes:
            return ""
        return f"ended by its time limit: {self.minutes:g} minutes allowed (limits.minutes), {seconds / 60:.2g} used"

    def large(self, used: int) -> str:
        """Why a cell that uses so many bytes is ended, or "".

        >>> Limits(gigabytes=1).large(1_230_000_000)
        'ended by its memory limit: 1 GB allowed (limits.gigabytes), 1.23 GB used'
        """
        if self.gigabytes is None or used <= 1e9 * self.gigabytes:
            return ""
        return f"ended by its memory limit: {self.gigabytes:g} GB allowed (limits.gigabytes), {used / 1e9:.3g} GB used"


class Executor(Protocol):
    """Runs cells; the driver calls it from one thread.

    What an executor must keep:

    - Every started cell gives exactly one answer, whatever happens to it: an exception, a limit, a killed process or a
      lost machine is an answer too, a record of status ``failed`` with its reason, and in ``provenance["failure"]``
      what kind it was (`execution.FAILURES`). Only `kill` and `close` take a cell's answer away.
    - A cell is run by `execution.perform`, so that its record is the same wherever it ran; its texts come with it.
    - A cell that it starts again by itself (a lost machine) is answered once, with the last run's record.
    - It keeps the limits that it was made with, and one cell cannot harm another, nor the driver.
    - It writes nothing into the store, prints nothing, and handles no signal: the driver does.
    - Nothing that it started is left after `close`, nor five seconds after the driver was killed.
    """

    @property
    def places(self) -> int:
        """How many cells may run side by side now; the driver starts no more than that."""

    def takes(self, cell: Cell) -> bool:
        """Whether this cell can be started now, when there is a place: False while the device that it needs is busy.

        With nothing running it takes any cell.
        """

    def start(self, cell: Cell) -> None:
        """Begin a cell and come back at once. What it needs has ended; the same id is not running."""

    def wait(self, wake: int, timeout: float | None = None) -> list[Answer]:
        """Answers of the cells that have ended since the last call, at least one if any is running.

        It may come back with none: when ``timeout`` seconds are over, and when the file descriptor ``wake`` can be
        read (Ctrl-C came); an engine that cannot wait on a descriptor looks at it every half second at least.
        The descriptor is not read here.
        """

    def kill(self, cell_id: str) -> None:
        """End one running cell at once; it gives no answer any more."""

    def close(self) -> None:
        """End whatever still runs, and give back what was taken. Called once, also after an error."""
