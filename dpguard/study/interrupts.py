"""Ctrl-C that is counted, so that it never lands in the middle of a write. No torch here."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
"""Exit status of a run that was stopped."""


class Interrupts:
    """Counts Ctrl-C instead of raising in the middle of a write, and wakes up whoever waits on ``wake``."""

    def __init__(self) -> None:
        self.count = 0
        self.wake, self._ring = os.pipe()
        self._before: Any = None

    def __enter__(self) -> Interrupts:
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
