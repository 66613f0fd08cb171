"""Keeps a server that was started for one run from outliving it, whatever happens to the process that asked for it.

A program of its own, in a session of its own: it starts the server, and ends it with all its processes when its
standard input closes. A pipe closes too when the process at its other end is killed with SIGKILL, which no ``finally``
survives. Only the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

MARK = "DPGUARD_SIMULATION"
"""Environment variable by which the processes of one run are recognised when it ends."""
STOP_SECONDS = 10.0
COMMAND = (sys.executable, "-I", __file__)
"""How a keeper starts; isolated (-I): neither the owner's PYTHONPATH nor the modules beside this file are looked at."""
ORDERLY = b"."
"""What the owner writes before it closes the pipe; without it the owner is gone, and so is the use of its folders."""
_LOOK_SECONDS = 0.2


def start(
    words: Sequence[str], *, environment: Mapping[str, str], log: Path, folders: Sequence[Path] = ()
) -> subprocess.Popen[bytes]:
    """Start a keeper and its server.

    Args:
        words: the server's command.
        environment: its variables, with `MARK` among them.
        log: where it writes.
        folders: what the keeper removes when the owner is gone; an owner that is there removes them itself.

    Returns:
        The keeper; it ends when the server does. Hand it to `stop`.
    """
    given = [item for folder in folders for item in ("--remove", str(folder))]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*COMMAND, *given, "--", *words], env=dict(environment), stdin=subprocess.PIPE,
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def stop(keeper: subprocess.Popen[bytes], mark: str) -> None:
    """End the server, then whatever of this run is left, the keeper among it should it hang."""
    with contextlib.suppress(OSError):
        if keeper.stdin is not None:
            keeper.stdin.write(ORDERLY)
            keeper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(4 * STOP_SECONDS)
    end_marked(mark)
    keeper.wait(STOP_SECONDS)


def is_keeper(pid: int) -> bool:
    """Whether a process is a keeper: who kills its owner leaves it alone, for it ends the rest, folders too."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[1 : len(COMMAND)] == [os.fsencode(word) for word in COMMAND[1:]]
    return False


def end_marked(mark: str, sessions: Collection[int] = ()) -> None:
    """End the processes that carry a mark and those of their sessions: by process id, asked first.

    Args:
        mark: see `MARK`.
        sessions: further ones, see `led`.
    """
    sessions = {*sessions, *led(mark)}
    for sent in (signal.SIGTERM, signal.SIGKILL):
        left = marked(mark, sessions)
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, sent)
        deadline = time.monotonic() + STOP_SECONDS
        while left and marked(mark, sessions) and time.monotonic() < deadline:
            time.sleep(0.1)


def led(mark: str) -> set[int]:
    """The sessions that marked processes lead. Ray's agents lie in one, and write their title over their mark."""
    found = marked(mark)
    return {process for process in found if _session(process) == process}


def _session(pid: int) -> int:
    """The session of a process, 0 of one that has ended."""
    with contextlib.suppress(OSError, ValueError):
        state, _parent, _group, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        return 0 if state == "Z" else int(session)
    return 0


def marked(mark: str, sessions: Collection[int] = ()) -> list[int]:
    """Processes that were started with a mark or are in one of the sessions, but this one; empty without /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            pid = int(entry.name)
            known = f"{MARK}={mark}".encode() in variables or _session(pid) in sessions
            if known and pid != os.getpid():
                found.append(pid)
    return found


def main(given: Sequence[str]) -> int:
    """Run ``[--remove FOLDER ...] -- COMMAND ...`` until it ends or the owner does; the command's exit status."""
    split = list(given).index("--")
    folders, words = list(given)[1:split:2], list(given)[split + 1 :]
    signal.signal(signal.SIGTERM, _leave)  # so that `finally` runs
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    said: bytes | None = None
    try:
        while server.poll() is None:
            if select.select([0], [], [], _LOOK_SECONDS)[0]:
                said = os.read(0, 1)
                break
    finally:
        _end(server)
    if said == b"":  # the end of the pipe without a word
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return abs(int(server.returncode or 0))


def _end(server: subprocess.Popen[bytes]) -> None:
    mark = os.environ.get(MARK, "?")
    sessions = led(mark)  # before their leaders end
    for ask in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
    end_marked(mark, sessions)


def _leave(_signal: int, _frame: object) -> NoReturn:
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
