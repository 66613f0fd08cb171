"""The embedded executor: one process a cell, forked from a server that has imported the heavy libraries once.

A worker ends when the driver does, keeps its output to itself, and cannot take the driver down: whatever
happens in it, exception or signal, comes back as a record. Its own side is `forked`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from dpguard.errors import UserError
from dpguard.study import forked, processes
from dpguard.study.cache import weights_kept
from dpguard.study.devices import takes_device
from dpguard.study.execution import failed
from dpguard.study.executor import Answer, Limits
from dpguard.study.forked import Setting
from dpguard.study.record import Cell

_CONTEXT = multiprocessing.get_context("forkserver")
_TAIL = 4000  # characters of a failed worker's output that are kept
_PATIENCE = 5.0  # seconds that a worker may take to end after it has answered
_RESTART = 10.0  # seconds for which a server that was just killed may look alive
_LOOK = 0.25  # seconds between looks at memory, and at workers whose server is gone
_LATER = 3600.0
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def warm_up(preload: Sequence[str] = (), threads: int = 1) -> None:
    """Start the server that workers are forked from; it imports ``preload`` while the caller goes on.

    Later calls change nothing: the server keeps what it has imported until this process ends.
    """
    _CONTEXT.set_forkserver_preload([forked.__name__, "dpguard.study.grid", *preload])
    with _server_environment(threads):
        forkserver.ensure_running()


class Workers:
    """Runs cells on this machine, each in a process of its own (an `executor.Executor`).

    Args:
        execute: ``module:function`` or ``path/to/file.py:function``, called with the cell and the context.
        context: plain data that every cell gets.
        places: cells side by side.
        limits: what a cell may use.
        threads: of each worker.
        devices: CUDA devices; when there are any, each running cell that `devices.takes_device` has one of its own,
            and the others run beside them without any.
    """

    def __init__(
        self,
        execute: str,
        context: Mapping[str, Any],
        places: int,
        *,
        limits: Limits | None = None,
        threads: int = 1,
        devices: Sequence[str] = (),
    ) -> None:
        self.execute = execute
        self.context = dict(context)
        self.places = places
        self.limits = limits or Limits()
        self.threads = threads
        self._devices = tuple(devices)
        self._free = list(devices)
        self._running: dict[str, Worker] = {}

    def takes(self, cell: Cell) -> bool:
        """Whether its device is free; see `Executor.takes`."""
        return bool(self._free) or not self._wants_device(cell)

    def start(self, cell: Cell) -> None:
        """Begin a cell; see `Executor.start`."""
        device = None if not self._devices else ""
        # weights that were there when it was asked for may be gone now: then it trains without, and says so
        if self._wants_device(cell) and (self._free or takes_device(cell)):
            device = self._free.pop(0)
        self._running[cell.id] = Worker(cell, self.execute, self.context, Setting(self.threads, device))

    def _wants_device(self, cell: Cell) -> bool:
        return bool(self._devices) and takes_device(cell, lambda trained: weights_kept(self.context, trained))

    def wait(self, wake: int, timeout: float | None = None) -> list[Answer]:
        """Answers of the cells that have ended; see `Executor.wait`."""
        until = time.monotonic() + (_LATER if timeout is None else timeout)
        while True:
            left = until - time.monotonic()
            woken = wait([*self._waitables(), wake], max(0.0, min(left, self._next_look())))
            for worker in self._running.values():
                worker.look(self.limits)
            ended = [worker for worker in self._running.values() if worker.ended]
            if ended or wake in woken or left <= 0:
                return [self._answer(worker) for worker in ended]

    def _waitables(self) -> list[Any]:
        return [item for worker in self._running.values() for item in worker.waitables]

    def _next_look(self) -> float:
        """Seconds until a limit may be passed."""
        if self.limits.gigabytes is not None or any(worker.alone for worker in self._running.values()):
            return _LOOK
        if self.limits.minutes is None or not self._running:
            return _LATER
        oldest = max(worker.seconds for worker in self._running.values())
        return max(0.05, 60 * self.limits.minutes - oldest + 0.01)

    def _answer(self, worker: Worker) -> Answer:
        answer = worker.answer()
        self._forget(worker)
        return answer

    def _forget(self, worker: Worker) -> None:
        del self._running[worker.cell.id]
        if worker.setting.device:
            self._free.insert(0, worker.setting.device)

    def kill(self, cell_id: str) -> None:
        """End a cell without an answer; see `Executor.kill`."""
        worker = self._running[cell_id]
        worker.close()
        self._forget(worker)

    def close(self) -> None:
        """End all that runs."""
        for cell_id in list(self._running):
            self.kill(cell_id)


class Worker:
    """A running cell, as the driver sees it.

    Attributes:
        cell: what it runs.
        setting: how.
        waitables: what `multiprocessing.connection.wait` wakes up on when something happened to it.
        alone: the server that could tell its exit status is gone.
    """

    def __init__(self, cell: Cell, execute: str, context: Mapping[str, Any], setting: Setting) -> None:
        self.cell = cell
        self.setting = setting
        self.alone = False
        self._answer: Answer | None = None
        self._code: int | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.receiver, self._process = _started(self._log.fileno(), cell, execute, context, setting)
        self._started = time.monotonic()  # after the server's imports, which are no cell's time
        self._member = processes.identity(self._process.pid or 0)

    @property
    def waitables(self) -> list[Connection | int]:
        """See the class."""
        return [self.receiver] if self.alone else [self.receiver, self._process.sentinel]

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    @property
    def ended(self) -> bool:
        """Whether `answer` has one to give (after a `look`)."""
        return self._answer is not None

    def look(self, limits: Limits) -> None:
        """Take the answer if there is one, find out that there will be none, or keep the limits."""
        if self._answer is not None:
            return
        self._settle(0)  # before the pipe is looked at: what was sent by then is in it
        over = self._code is not None or (self.alone and not processes.is_same(self._member))
        if self.receiver.poll():
            with contextlib.suppress(EOFError, OSError):  # it died before or within its answer
                self._answer = self.receiver.recv()
            over = self._answer is None
        if over:
            self._settle(_PATIENCE)
            self._answer = failed(self.cell, *_ending(self._code))
        elif self._answer is None:
            self._keep(limits)

    def _settle(self, patience: float) -> None:
        """Learn the exit status if it comes within so many seconds, or that nobody can tell it any more.

        multiprocessing would say 255 for a server that was killed, as for a worker that ended so. The pipe behind its
        sentinel tells the two apart: the server writes the status, or its end closes the pipe.
        """
        if self.alone or self._code is not None or not wait([self._process.sentinel], patience):
            return
        try:
            self._code = forkserver.read_signed(self._process.sentinel)
        except (EOFError, OSError):
            self.alone = True
        vars(self._process)["_popen"].returncode = 255 if self._code is None else self._code

    def _keep(self, limits: Limits) -> None:
        """End the worker when it is over a limit.

        Memory is looked at from outside, as resident pages, a few times a second. A limit that the system enforces
        (RLIMIT_AS) counts address space, of which torch maps many times what it uses.
        """
        late = limits.late(self.seconds)
        used = 0 if limits.gigabytes is None else processes.memory(self._process.pid or 0)
        large = limits.large(used)
        if not late and not large:
            return
        self._end()
        spent = {"seconds": round(self.seconds, 3), **({"peak_mb": round(used / 1e6, 1)} if used else {})}
        self._answer = failed(self.cell, "time" if late else "memory", late or large, **spent)

    def answer(self) -> Answer:
        """What the cell left; a failed record when the worker did not live to say so. Call it once it has `ended`."""
        if self._answer is None:
            raise RuntimeError(f"cell {self.cell.id} still runs")
        record, texts = self._answer
        self._settle(_PATIENCE)
        if record.status == "failed":
            output = {"output": self._output()}
            record = dataclasses.replace(record, provenance={**record.provenance, **output})
        self.close()
        return record, texts

    def _output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace")

    def _end(self) -> None:
        """Kill the worker and all that its cell has started."""
        processes.end(self._member)
        self._settle(_PATIENCE)

    def close(self) -> None:
        """End what still runs of it, and let its pipes go."""
        self._end()
        with contextlib.suppress(ValueError):  # a process that cannot be waited for keeps its handle
            self._process.close()
        self.receiver.close()
        self._log.close()


def _started(
    log: int, cell: Cell, execute: str, context: Mapping[str, Any], setting: Setting
) -> tuple[Connection, ForkServerProcess]:
    """Where the answer will come from, and the process.

    A server that was killed refuses connections a moment before the system reports its end; until then
    multiprocessing starts no other. So it is asked again for a while. Each time with another pipe: a worker that the
    dying server did fork ends by itself, and must not answer in place of the next.
    """
    deadline = time.monotonic() + _RESTART
    while True:
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        try:
            with _server_environment(setting.threads), _without_main():
                process = _CONTEXT.Process(
                    target=forked.live, args=(sender, _Passed(log), cell, execute, dict(context), setting)
                )
                process.start()
            # Whenever it starts another, multiprocessing reads the exit status of all that it knows; this one is ours.
            vars(multiprocessing.process)["_children"].discard(process)
            return receiver, process
        except (EOFError, OSError) as error:
            receiver.close()
            if time.monotonic() > deadline:
                raise UserError(
                    f"no worker could be started ({error or 'its server ended'}), expected room for another process; "
                    "what is stored stays"
                ) from error
            time.sleep(0.05)
        finally:
            # The driver must not hold the sending end, or it would never see the end of the worker's answer.
            sender.close()


def _ending(exit_code: int | None) -> tuple[str, str]:
    """(kind of failure, reason) of a worker that gave no answer.

    >>> _ending(-11), _ending(3)
    (('crashed', 'worker ended with signal 11 (SIGSEGV)'), ('crashed', 'worker ended with exit status 3'))
    >>> _ending(-9)[1]
    'worker ended with signal 9 (SIGKILL): somebody ended it, or the system ran out of memory'
    """
    if exit_code is None:
        return "killed", "worker ended together with the server that it was forked from"
    if exit_code >= 0:
        return "crashed", f"worker ended with exit status {exit_code}"
    known = {item.value: f" ({item.name})" for item in signal.Signals}
    reason = f"worker ended with signal {-exit_code}{known.get(-exit_code, '')}"
    if -exit_code == signal.SIGKILL:
        reason += ": somebody ended it, or the system ran out of memory"
    return "killed" if -exit_code in _OUTSIDE else "crashed", reason


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
def _server_environment(threads: int) -> Iterator[None]:
    """The server inherits this environment when the call inside is the one that starts it."""
    # Set before any numeric library starts its pool of threads, which happens in the server.
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    wanted = {**dict.fromkeys(pools, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
    if threading.current_thread() is threading.main_thread():
        wanted[forked.DRIVER] = str(os.getpid())
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
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
