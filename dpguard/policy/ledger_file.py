"""The file of a ledger: one writer at a time, never half written, and read with checks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpguard.errors import UserError

FORMAT = "dpguard ledger"
VERSION = 1


class Lock:
    """Holds ``<path>.lock`` until closed; the operating system lets go of it when the process dies.

    The lock file remembers how many messages were entered: a ledger that has gone, or an older copy, is noticed.

    Raises:
        UserError: another ledger, here or in another process, holds it; or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot open a ledger at {path}: {error.strerror}; expected a writable folder") from None
        if not _lock(self._handle):
            os.close(self._handle)
            raise UserError(f"ledger {path} is in use; expected one process at a time to spend from it")
        self._process = os.getpid()
        self._close = weakref.finalize(self, _release, self._handle, self._process)

    @property
    def held(self) -> bool:
        """True until closed, in the process that opened it; a forked child must not spend."""
        return self._close.alive and os.getpid() == self._process

    @property
    def entered(self) -> int:
        """How many messages were ever entered in the ledger beside this lock, as far as is known."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        written = os.read(self._handle, 32).strip()
        return int(written) if written.isdigit() else 0

    def enter(self, messages: int) -> None:
        """Remember how many messages the ledger holds."""
        with contextlib.suppress(OSError):  # a full disk: the ledger itself is written, and that is what counts
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, f"{messages:20d}\n".encode())

    def close(self) -> None:
        """Let go; a second call does nothing."""
        self._close()


def _release(handle: int, process: int) -> None:
    # Explicitly, because a forked child's copy of the handle would keep the lock; never from that child.
    if os.getpid() == process:
        _unlock(handle)
    os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step: what is on disk is the old ledger or the new one, also after a power cut.

    Raises:
        UserError: the disk refuses (full, read-only); the old file is untouched then.
    """
    whole = {"format": FORMAT, "version": VERSION, **content, "checksum": _checksum(content)}
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write ledger {path}: {error.strerror}; expected a disk with space left") from None


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        # some network file systems cannot sync a folder; the file itself is on disk by then
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> dict[str, Any]:
    """The content that `write` was given.

    Raises:
        UserError: no ledger, of an unknown version, or damaged.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read ledger {path}: {error.strerror}") from None
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise UserError(f"{path} is no ledger of dpguard; expected another path, or the ledger from a copy")
    version = found.pop("version", None)
    if version != VERSION:
        raise UserError(f"ledger {path} has version {version!r}, expected {VERSION}: it was written by another dpguard")
    if found.pop("checksum", None) != _checksum(found):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> UserError:
    return UserError(
        f"ledger {path} is damaged; expected the file as it was written, from a copy (a new one would forget what "
        "was spent)"
    )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
