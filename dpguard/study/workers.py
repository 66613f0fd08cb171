"""One process a cell: forked from a server that has imported the heavy libraries once, and watched.

A worker ends when the driver does, keeps its output to itself, and cannot take the driver down: whatever
happens in it, exception or signal, comes back as a record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.record import Cell, Record, TextRow, canonical

Answer = tuple[Record, list[TextRow]]
Execute = Callable[[Cell, Mapping[str, Any]], tuple[Record, Sequence[TextRow]]]

_CONTEXT = multiprocessing.get_context("forkserver")
_TAIL = 4000  # characters of a failed worker's output that are kept
_PATIENCE = 5.0  # seconds that a worker may take to end after it has answered
# One thread a worker; set before any numeric library starts its pool, which happens in the server.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def warm_up(preload: Sequence[str] = ()) -> None:
    """Start the server that workers are forked from; it imports ``preload`` while the caller goes on.

    Later calls change nothing: the server keeps what it has imported until this process ends.
    """
    _CONTEXT.set_forkserver_preload([__name__, *preload])
    with _server_environment():
        forkserver.ensure_running()


class Worker:
    """A running cell, as the driver sees it.

    Args:
        cell: what to run.
        execute: ``module:function`` or ``path/to/file.py:function``, called with the cell and the context.
        context: plain data that every cell gets.
    """

    def __init__(self, cell: Cell, execute: str, context: Mapping[str, Any]) -> None:
        self.cell = cell
        self.receiver, sender = _CONTEXT.Pipe(duplex=False)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `answer`
        arguments = (sender, _Passed(self._log.fileno()), cell, execute, dict(context))
        try:
            self._process = _started(arguments)
        except (EOFError, OSError):
            # The server was killed a moment ago; asked once more, multiprocessing starts another.
            self._process = _started(arguments)
        # The driver must not hold the sending end, or it would never see the end of the worker's answer.
        sender.close()

    @property
    def waitable(self) -> tuple[Connection, int]:
        """What `multiprocessing.connection.wait` wakes up on when the cell has ended."""
        return self.receiver, self._process.sentinel

    def kill(self) -> None:
        """End the worker at once; its cell gets no record."""
        self._process.kill()
        self._close()

    def answer(self) -> Answer:
        """What the cell left; a failed record when the worker did not live to say so.

        Call it when `waitable` woke up.
        """
        answer: Answer | None = None
        with contextlib.suppress(EOFError, OSError):  # it died before or within its answer
            if self.receiver.poll():
                answer = self.receiver.recv()
        self._process.join(_PATIENCE)
        if answer is None:
            answer = Record(self.cell, "failed", _ending(self._process.exitcode)), []
        record, texts = answer
        if record.status == "failed":
            output = {"output": self._output()}
            record = dataclasses.replace(record, provenance={**record.provenance, **output})
        self._close()
        return record, texts

    def _output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace")

    def _close(self) -> None:
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self.receiver.close()
        self._log.close()


def _started(arguments: tuple[Any, ...]) -> ForkServerProcess:
    with _server_environment(), _without_main():
        process = _CONTEXT.Process(target=_work, args=arguments)
        process.start()
    return process


def _ending(exit_code: int | None) -> str:
    """Why a worker that gave no answer ended.

    >>> _ending(-9), _ending(3)
    ('worker ended with signal 9 (SIGKILL)', 'worker ended with exit status 3')
    """
    if exit_code is not None and exit_code < 0:
        known = {item.value: f" ({item.name})" for item in signal.Signals}
        return f"worker ended with signal {-exit_code}{known.get(-exit_code, '')}"
    return f"worker ended with exit status {exit_code}"


class _Passed:
    """A file descriptor that arrives open in the worker."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(passed: Any) -> int:
    descriptor: int = passed.detach()
    return descriptor


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """The server inherits this environment when the call inside is the one that starts it."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep workers from importing the driver's main script again.

    multiprocessing does so for functions that live there. Ours never do; it would cost every cell the
    imports of the command line, and run a user's script that has no ``__name__`` guard once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(sender: Connection, log: int, cell: Cell, execute: str, context: dict[str, Any]) -> None:
    """A worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    record, texts = _executed(cell, execute, context)
    spent: dict[str, Any] = {
        "started": started,
        "seconds": round(time.perf_counter() - clock, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    sender.send((dataclasses.replace(record, provenance={**spent, **record.provenance}), texts))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and libraries' exit handlers cost time in every cell


def _executed(cell: Cell, execute: str, context: dict[str, Any]) -> Answer:
    """The cell's answer; any exception becomes a failed record with its reason and traceback."""
    try:
        record, texts = function(execute)(cell, context)
        if record.cell.id != cell.id:
            raise ValueError(f"{execute} answered cell {cell.id} with a record of cell {record.cell.id}")
        canonical(dataclasses.asdict(record))  # a tensor or a NaN in a record is this cell's failure
        return record, list(texts)
    except Exception as error:
        message = " ".join(str(error).split())[:500]
        reason = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
        return Record(cell, "failed", reason, provenance={"traceback": traceback.format_exc()}), []


def function(name: str) -> Execute:
    """The function called ``module:function`` or ``path/to/file.py:function``."""
    source, _, attribute = name.rpartition(":")
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found: Execute = getattr(module, attribute)
    return found


def _end_with_driver() -> None:
    """Wait for the driver to end, however it ends, or for the server, which alone can tell it of our end."""
    driver, server = multiprocessing.parent_process(), os.getppid()
    if driver is not None:
        while os.getppid() == server and not wait([driver.sentinel], timeout=1.0):
            pass
        os._exit(1)
