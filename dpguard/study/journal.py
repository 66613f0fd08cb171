"""What a run is doing now, in a small file beside the records, for whoever asks from another shell. No torch here.

It is a courtesy: nothing is decided by it, and a disk without room for it stops no run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpguard.study.lock import now
from dpguard.study.record import canonical

FILE = "running.json"


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
        ended: how it ended (``finished``, ``interrupted`` or an error in a sentence); "" while it runs, and for ever
            when it was killed.
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
            part.write_text(canonical(asdict(self)), "utf-8")
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
