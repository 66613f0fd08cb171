"""Work that several cells share, kept by content beside the records: done once, whoever comes first.

No torch here; for tensors see `tensors`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dpguard.study.record import canonical

FOLDER = "cache"
GIGABYTES = 4.0
"""Room that a study's cache may take when nothing else is said."""
TENSORS = ".safetensors"
"""Suffix of entries that hold tensors."""
_LOCKS = "locks"
_SHARE = 0.5  # of the room that one entry may take: a larger one would push out everything else for one use

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file of the cache: what it holds, its size in bytes, when it was last used (seconds of the epoch)."""

    path: Path
    bytes: int
    used: float

    @property
    def what(self) -> str:
        """What it holds, as its name says: ``weights`` or ``kappa``."""
        return self.path.name.rpartition("-")[0]


class Cache:
    """Plain data, or whatever a file can hold, by the content of what it was made from.

    A cell that needs what another is making just now waits for it. An entry is written beside its place and moved
    there, so it is never half a file, whenever a process is killed; what cannot be read or written, for want of room
    or otherwise, is made again. Over its room, the cache drops what was used longest ago. Deleting it costs time,
    nothing else.

    Args:
        folder: the study's folder.
        gigabytes: room for all entries (10^9 bytes); 0 = keep nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Cache(folder).plain({"what": "square", "of": 3}, lambda: 9), Cache(folder).plain(
    ...         {"what": "square", "of": 3}, lambda: 0
    ...     )
    (9, 9)
    """

    def __init__(self, folder: str | Path, gigabytes: float = GIGABYTES) -> None:
        self.folder = Path(folder) / FOLDER
        self.room = int(gigabytes * 1e9)

    def plain(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What ``make`` gives (plain data), from the cache when an entry of this key is there and readable."""

        def write(path: Path, made: Any) -> None:
            path.write_text(canonical(made), "utf-8")

        found = self.entry(key, ".json", lambda path: json.loads(path.read_text("utf-8")), make, write)
        return json.loads(canonical(found))

    def entry(
        self,
        key: Mapping[str, Any],
        suffix: str,
        read: Callable[[Path], T],
        make: Callable[[], T],
        write: Callable[[Path, T], None],
    ) -> T:
        """As `plain`, for anything that can be read from a file and written to one.

        Args:
            key: what it is made from; ``key["what"]`` names the file.
            suffix: of the file.
            read: reads it; raises OSError, ValueError or a SafetensorError for a file that is not whole.
            make: makes it.
            write: writes it; nothing is kept when it writes no file.
        """
        if self.room <= 0:
            return make()
        path = self._path(key, suffix)
        with self._turn(path.stem.rpartition("-")[2]):
            found = _read(path, read)
            if found is not None:
                return found[0]
            made = make()
            self._keep(path, made, write)
            return made

    def put(self, key: Mapping[str, Any], suffix: str, made: T, write: Callable[[Path, T], None]) -> None:
        """Keep what was just made in place of an entry of this key: what a run that failed left, say.

        Args:
            key: as for `entry`.
            suffix: of the file.
            made: what to keep.
            write: writes it.
        """
        if self.room > 0:
            path = self._path(key, suffix)
            with self._turn(path.stem.rpartition("-")[2]):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # also where the new one has no room
                self._keep(path, made, write)

    def has(self, key: Mapping[str, Any], suffix: str) -> bool:
        """Whether an entry is there; it may be gone, or turn out not to be whole, when it is read."""
        return self.room > 0 and self._path(key, suffix).is_file()

    def adopt(self, other: Cache, key: Mapping[str, Any], suffix: str) -> None:
        """Copy another cache's entry where this one has none, if nothing has to go for it."""
        source, path = other._path(key, suffix), self._path(key, suffix)
        if path.exists() or not source.is_file():
            return
        size = source.stat().st_size
        if self.keeps(size) and size + sum(entry.bytes for entry in self.entries()) <= self.room:

            def copy(part: Path, found: Path) -> None:
                shutil.copy2(found, part)  # as private as it was, and as old

            self._keep(path, source, copy)

    def keeps(self, size: int) -> bool:
        """Whether an entry of so many bytes is kept."""
        return size <= self.room * _SHARE

    def _path(self, key: Mapping[str, Any], suffix: str) -> Path:
        digest = hashlib.sha256(canonical(dict(key)).encode()).hexdigest()[:20]
        return self.folder / f"{key.get('what', 'entry')}-{digest}{suffix}"

    def _keep(self, path: Path, made: T, write: Callable[[Path, T], None]) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(part, made)
            if part.exists() and self.keeps(part.stat().st_size):
                part.replace(path)
                self._make_room(path)
        except Exception as error:
            # No room on the disk, a folder that cannot be written: the work is done, it is only not kept.
            # safetensors tells both in an exception of its own.
            if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                raise
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _turn(self, digest: str) -> Iterator[None]:
        """One process at a time for each entry; the system gives the turn back when its holder is killed."""
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / _LOCKS / digest, "a", encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError:
            yield
            return
        with lock:
            with contextlib.suppress(OSError):  # a file system without locks: both make it
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def entries(self) -> list[Entry]:
        """All entries, the one used longest ago first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if path.is_file() and path.suffix != ".part":
                    state = path.stat()
                    found.append(Entry(path, state.st_size, state.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def _make_room(self, newest: Path) -> None:
        """Drop what was used longest ago until the rest has room. A process that reads it keeps its open file."""
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total <= self.room:
                return
            if entry.path != newest:
                with contextlib.suppress(OSError):
                    entry.path.unlink()
                    total -= entry.bytes

    def tidy(self) -> None:
        """Remove what killed processes left half written. Only while no cell runs."""
        for path in self.folder.glob("*.part"):
            with contextlib.suppress(OSError):
                path.unlink()

    def clear(self) -> int:
        """Drop all entries; how many bytes that were."""
        freed = 0
        for entry in self.entries():
            with contextlib.suppress(OSError):
                entry.path.unlink()
                freed += entry.bytes
        return freed


def cache_of(context: Mapping[str, Any]) -> Cache:
    """The cache of the study that a cell's context is of; one without room where there is no folder."""
    room = context.get("cache_gigabytes", GIGABYTES) if "folder" in context else 0
    return Cache(context.get("folder", ""), room)


def weights_key(cell_id: str, moment: int | str = "end") -> dict[str, Any]:
    """What weights are kept by: the utility cell that trained them, and when (``end``, or before a round)."""
    return {"what": "weights", "cell": cell_id, "moment": moment}


def weights_kept(context: Mapping[str, Any], cell_id: str) -> bool:
    """Whether the weights that a utility cell of central training ended with are there."""
    return cache_of(context).has(weights_key(cell_id), TENSORS)


def _read(path: Path, read: Callable[[Path], T]) -> tuple[T] | None:
    """The entry, marked as used; None when it is not there or not whole."""
    try:
        found = read(path)
    except OSError:
        return None
    except Exception as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "SafetensorError":
            raise
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return (found,)
