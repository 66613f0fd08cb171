"""What a run is doing now, in a small file beside the records, for whoever asks from another shell. No torch here.

It is a courtesy: nothing is decided by it, and a disk without room for it stops no run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.lock import now
from dpguard.study.record import canonical, encodable

FILE = "running.json"
FINISHED, SEARCHING, INTERRUPTED = "finished", "searching", "interrupted"
"""How a run ended: all has run; all has, and a sweep's next value is looked for; something is left."""


@dataclass(frozen=True)
class Running:
    """A cell that runs.

    Attributes:
        id: the cell's.
        words: it in words.
        since: when it was started, seconds of the epoch.
    """

    id: str
    words: str
    since: float


@dataclass(frozen=True)
class Journal:
    """The state of a run.

    Attributes:
        pid, host, since: of the driver.
        workers: cells side by side.
        running: oldest first.
        at: when this was written, seconds of the epoch.
        remaining: seconds until all is done, as expected then; None = nothing known yet.
        best: the best point so far, in a sentence; "" = none yet.
        ended: how it ended (`FINISHED`, `SEARCHING`, `INTERRUPTED`, or an error in a sentence); "" while it runs, and
            for ever when it was killed.
    """

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: str = field(default_factory=now)
    workers: int = 0
    running: tuple[Running, ...] = ()
    at: float = 0.0
    remaining: float | None = None
    best: str = ""
    ended: str = ""

    def write(self, folder: str | Path) -> None:
        """Put it into the folder in place of the last; never half a file."""
        path = Path(folder) / FILE
        part = path.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(encodable(canonical(asdict(self))), "utf-8")
            part.replace(path)

    @staticmethod
    def read(folder: str | Path) -> Journal | None:
        """The state of the last run in a folder; None when it left none that can be read."""
        try:
            plain: dict[str, Any] = json.loads((Path(folder) / FILE).read_text("utf-8"))
            running = tuple(Running(**one) for one in plain.pop("running"))
            return Journal(**plain, running=running)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


@contextlib.contextmanager
def kept(folder: str | Path, when_done: str = FINISHED) -> Iterator[None]:
    """Say that a run has begun, in place of what the last one left, and how it ended if nobody else has said so."""
    Journal(at=round(time.time(), 2)).write(folder)
    ended = "error"
    try:
        yield
        ended = when_done
    except UserError as error:
        ended = str(error)
        raise
    except KeyboardInterrupt:
        ended = INTERRUPTED
        raise
    finally:
        found = Journal.read(folder)
        if found is not None and not found.ended:
            mark(folder, ended)


def mark(folder: str | Path, ended: str) -> None:
    """Say how the last run in a folder ended."""
    found = Journal.read(folder)
    if found is not None:
        replace(found, at=round(time.time(), 2), ended=ended).write(folder)
