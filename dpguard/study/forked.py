"""A worker's own side: what a forked process does from its first line to its last, and how it ends with its driver.

Imported by the server that workers are forked from, before anything heavy (see `workers.warm_up`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from dpguard.study import processes
from dpguard.study.execution import perform
from dpguard.study.record import Cell

DRIVER = "DPGUARD_DRIVER"
"""Names the driver's process to the server, which ends with it even in the middle of an import."""
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc, malloc.h


@dataclass(frozen=True)
class Setting:
    """How a worker runs.

    Attributes:
        threads: of torch and the numeric libraries.
        device: the one CUDA device that it sees, as in CUDA_VISIBLE_DEVICES, and that its cell is told to use
            (``context["device"]``); "" = it sees none; None = leave the environment as it is.
    """

    threads: int = 1
    device: str | None = None


def live(sender: Connection, log: int, cell: Cell, execute: str, context: Mapping[str, Any], setting: Setting) -> None:
    """Run one cell, send its answer, end.

    Args:
        sender: takes the answer.
        log: file descriptor that takes all output.
        cell, execute, context: see `execution.perform`.
        setting: threads and device.
    """
    # A group of its own: Ctrl-C reaches the driver alone, and whatever the cell starts can be ended with it.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    if setting.device is not None:  # read when CUDA is first touched, which the server never does
        os.environ["CUDA_VISIBLE_DEVICES"] = setting.device
    if setting.device:
        context = {**context, "device": "cuda"}
    _keep_freed_memory()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(setting.threads)
    sender.send(perform(cell, execute, context))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and libraries' exit handlers cost time in every cell


def _keep_freed_memory() -> None:
    """Let glibc use again what was freed instead of giving it back: a worker lives for one cell.

    Otherwise every large tensor is mapped and cleared by the system anew: 6 to 19 % of a training's CPU seconds, at the
    same peak of memory (measured on MiniLM). Other C libraries go on as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _end_with_driver() -> None:
    """Wait for the driver to end, however it ends, and end with it and all that the cell started, but for keepers.

    The server may end meanwhile: this worker goes on, and its answer still reaches the driver.
    """
    driver = parent_process()
    if driver is not None:
        wait([driver.sentinel])
        processes.end_all(processes.descendants(os.getpid(), kept=False))
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _end_server_with_driver() -> None:
    """Let the system kill this server when the driver ends. Its own loop sees that only after all its imports.

    Asked for by the driver through `DRIVER`, which is only set by a main thread: the system sends the signal when the
    thread that started the server ends. Elsewhere than on Linux the loop must do.
    """
    driver = os.environ.pop(DRIVER, None)
    if driver is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, while this still imports too
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(driver):  # it ended a moment ago
            os._exit(1)


_end_server_with_driver()
