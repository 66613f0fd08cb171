"""One writer a folder: a lock that the system lets go when its holder ends, however it ends. No torch here."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from dpguard.errors import UserError
from dpguard.study.record import canonical

LOCK = "records.lock"


def claim(folder: Path) -> IO[str]:
    """Make the folder and hold its lock, which the system lets go when this process ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - it is held until `close`
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written ({error.strerror}), expected a folder for records"
        ) from None
    for attempt in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # another run's, or for a moment that of `in_use`
            if attempt < 9:
                time.sleep(0.05)
    else:
        holder = _holder(lock)
        lock.close()
        raise UserError(f"{str(folder)!r} is in use by {holder}, expected a folder that no other run writes to")
    try:
        lock.truncate(0)
        lock.write(canonical({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}) + "\n")
        lock.flush()
    except OSError as error:
        lock.close()
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}), expected room for records") from None
    return lock


def in_use(folder: str | Path) -> str:
    """Who writes to a folder now, as ``process 4711 on host since 2026-01-31T10:00:00+00:00``; "" if nobody does."""
    try:
        with open(Path(folder) / LOCK, encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(lock)
    except OSError:
        return ""
    return ""


def now() -> str:
    """This moment, to the second, as ISO 8601 with its zone."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _holder(lock: IO[str]) -> str:
    """Who holds a lock file, in words; the holder writes that a moment after it takes the lock."""
    for _ in range(20):
        lock.seek(0)
        text = lock.read()
        if text.endswith("\n"):
            try:
                held = json.loads(text)
                return f"process {held['pid']} on {held['host']} since {held['since']}"
            except (ValueError, TypeError, KeyError):
                return f"process {text.strip()}"  # an earlier version wrote its number alone
        time.sleep(0.05)
    return "another process"
