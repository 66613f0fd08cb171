"""What the system says about other processes, from /proc: alive, how much memory, which children; and how to end them.

Where there is no /proc (macOS) a process is judged by its number alone, and memory cannot be measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dpguard.federation.keeper import is_keeper

PROC = Path("/proc")


@dataclass(frozen=True)
class Identity:
    """A process that keeps being the same one: numbers are used again, moments of starting are not.

    Attributes:
        pid: its number.
        started: clock ticks from the start of the system to its own; "" where the system does not say.
    """

    pid: int
    started: str


def _fields(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third on (state, parent, group, session, ...); empty when it is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def identity(pid: int) -> Identity:
    """The identity of a process that runs now."""
    fields = _fields(pid)
    return Identity(pid, fields[19] if fields else "")


def is_same(process: Identity) -> bool:
    """Whether this very process still runs (a zombie does not)."""
    if process.pid <= 0:
        return False
    if not PROC.is_dir():
        with contextlib.suppress(OSError):
            os.kill(process.pid, 0)
            return True
        return False
    fields = _fields(process.pid)
    return bool(fields) and fields[0] != "Z" and fields[19] == process.started


def descendants(pid: int, *, kept: bool = True) -> list[int]:
    """The children of a process, theirs, and so on; without ``kept`` no keeper, nor anything below one."""
    found: list[int] = []
    for tasks in (PROC / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                if kept or not is_keeper(child):
                    found += [child, *descendants(child, kept=kept)]
    return found


def memory(pid: int) -> int:
    """Resident memory of a process and its descendants in bytes, shared pages counted once a process; 0 if gone."""
    pages = 0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError, IndexError, ValueError):
            pages += int((PROC / str(one) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def end(process: Identity) -> None:
    """Kill a worker, its descendants, and its process group, of which it is the leader; nothing if all are gone.

    A keeper is let live: it sees its owner's end, ends its server and removes what lies there for it.
    """
    if is_same(process):
        end_all([*descendants(process.pid, kept=False), process.pid])
    end_all(_group(process.pid))


def _group(leader: int) -> list[int]:
    """What is left of the group of a worker of this session, which nobody else can lead as long as there is any."""
    if leader <= 1:
        return []
    try:
        os.killpg(leader, 0)
    except (OSError, OverflowError):
        return []
    session = str(os.getsid(0))
    found = []
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        fields = _fields(entry.name) if entry.name.isdigit() else []
        if fields and fields[2] == str(leader) and fields[3] == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def end_all(pids: Iterable[int]) -> None:
    """Kill processes; those that are gone already are no matter."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
