"""Runs cells on an existing Ray cluster (`executor.Executor`): one task a cell, the same records. No torch here.

In its task a cell runs as it does at home (`workers`): in a process of its own, under the study's limits, ended when
the task ends. So Ray has nothing to do but to find a place, and another one when a node is lost. Model and texts do not
travel: each node has them under the same path, and every cell checks their fingerprints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dpguard
from dpguard.errors import UserError
from dpguard.study.execution import failed
from dpguard.study.executor import Answer, Limits
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell, Record, TextRow

RETRIES = 3
"""How often a cell is started again when its node, or Ray's worker on it, is lost."""
_REACH = 5.0  # seconds in which the address must answer
_JOIN = 20.0  # seconds in which the cluster must let us in
_LOOK = 0.3  # seconds between looks at Ctrl-C
_COUNT = 2.0  # seconds for which the number of places is taken as known
_CLIENT = "ray://"


class RayCells:
    """Cells as tasks of a Ray cluster.

    Args:
        address: ``host:port`` of the cluster's head, ``ray://host:port``, or ``auto``.
        execute: ``module:function``, importable on every node.
        context: plain data that every cell gets; paths in it are made absolute.
        limits: what a cell may use.
        threads: of each cell, and CPUs that it takes.
        gpus: GPUs that it takes.
        preload: modules that a node's worker server imports once.

    Raises:
        UserError: Ray is not installed, nothing answers at the address, or the cluster does not let us in.
    """

    def __init__(
        self,
        address: str,
        execute: str,
        context: Mapping[str, Any],
        *,
        limits: Limits | None = None,
        threads: int = 1,
        gpus: float = 0,
        preload: tuple[str, ...] = (),
    ) -> None:
        self._ray = connect(address)
        self._asked = {
            "execute": execute, "context": absolute(context), "limits": asdict(limits or Limits()),
            "threads": threads, "preload": list(preload), "versions": versions(),
        }  # fmt: skip
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": RETRIES, "retry_exceptions": False}
        self._task = self._ray.remote(**options)(_task())
        self._threads = threads
        self._running: dict[str, tuple[Cell, Any]] = {}
        self._homes: dict[str, str] = {}
        self._counted: tuple[float, int] = (-_COUNT, 1)

    @property
    def places(self) -> int:
        """CPUs of the nodes that are alive, at least 1."""
        if time.monotonic() - self._counted[0] >= _COUNT:
            with contextlib.suppress(Exception):  # the head is away for a moment; the last count stands
                cpus = self._ray.cluster_resources().get("CPU", 0)
                self._counted = (time.monotonic(), max(1, int(cpus // self._threads)))
        return self._counted[1]

    def takes(self, cell: Cell) -> bool:
        """Any cell: Ray queues it; see `Executor.takes`. Cells run on CPUs there."""
        return True

    def start(self, cell: Cell) -> None:
        """Begin a cell; see `Executor.start`. It goes to the node that has the weights it needs, if there is one."""
        task = self._task
        home = self._homes.get(str(cell.settings.get(NEEDS)))
        if home is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            task = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=True))
        self._running[cell.id] = cell, task.remote(json.dumps(asdict(cell)), self._asked)

    def wait(self, wake: int, timeout: float | None = None) -> list[Answer]:
        """Answers of the cells that have ended; see `Executor.wait`."""
        until = time.monotonic() + timeout if timeout is not None else float("inf")
        while self._running:
            left = until - time.monotonic()
            references = {reference: cell_id for cell_id, (_, reference) in self._running.items()}
            ready, _ = self._ray.wait(
                list(references), num_returns=1, timeout=max(0.0, min(_LOOK, left)), fetch_local=False
            )
            if ready:
                more, _ = self._ray.wait(list(references), num_returns=len(references), timeout=0, fetch_local=False)
                return [self._answer(*self._running.pop(references[reference])) for reference in more or ready]
            if left <= 0 or select.select([wake], [], [], 0)[0]:
                break
        return []

    def _answer(self, cell: Cell, reference: Any) -> Answer:
        errors = self._ray.exceptions
        try:
            plain = json.loads(self._ray.get(reference))
        except errors.OutOfMemoryError:
            return failed(cell, "memory", "ended by the cluster: its node ran out of memory")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError):
            return failed(cell, "killed", f"its node, or Ray's worker on it, was lost {RETRIES + 1} times")
        except errors.RayError as error:
            return failed(cell, "crashed", f"Ray: {' '.join(str(error).split())[:300]}")
        self._homes[cell.id] = plain["node"]
        record = Record(cell, plain["status"], plain["reason"], plain["result"], plain["provenance"])
        return record, [TextRow(**row) for row in plain["texts"]]

    def kill(self, cell_id: str) -> None:
        """End one running cell; see `Executor.kill`."""
        _, reference = self._running.pop(cell_id)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """End what runs, and leave the cluster; see `Executor.close`."""
        for cell_id in list(self._running):
            self.kill(cell_id)
        self._ray.shutdown()


def _task() -> Callable[[str, Mapping[str, Any]], str]:
    """What runs on a node: a local function, so that it travels by value and needs nothing there to be told apart."""

    def run_cell(plain: str, asked: Mapping[str, Any]) -> str:
        import json
        import os
        import socket

        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cell = json.loads(plain)
        node = ray.get_runtime_context().get_node_id()
        try:
            from dpguard.study.ray_node import perform
        except ImportError as error:
            reason = f"dpguard cannot be imported on node {socket.gethostname()} ({error}), expected it on every node"
            nothing = {"provenance": {"failure": "raised"}, "result": {}, "texts": []}
            return json.dumps({"node": node, "status": "failed", "reason": reason, **nothing})
        return json.dumps({"node": node, **perform(cell, asked)})

    return run_cell


def versions() -> dict[str, str]:
    """What must be the same on every node for the records to be."""
    import importlib.metadata as metadata

    return {"dpguard": dpguard.__version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}


def absolute(context: Mapping[str, Any]) -> dict[str, Any]:
    """The context with paths that mean the same wherever the cell runs."""
    out = dict(context)
    for name in ("folder", "model"):
        if name in out and (name == "folder" or Path(out[name]).exists()):
            out[name] = str(Path(out[name]).resolve())
    if "data" in out:
        beside = Path(out["data"].get("beside") or ".")
        here = {
            name: str(Path(value).resolve())
            for name, value in out["data"].items()
            if name in ("path", "test", "public") and value and not (beside / value).exists() and Path(value).exists()
        }
        out["data"] = {**out["data"], "beside": str(beside.resolve()), **here}
    return out


def connect(address: str) -> Any:
    """Join a running cluster; the ray module.

    Ray reads ``RAY_AUTH_TOKEN`` and its kin from this process's environment by itself: they are not looked at, copied
    into a task, stored or printed here.

    Raises:
        UserError: see `RayCells`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    reach(address)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    problems: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_JOIN)
    if thread.is_alive():
        raise UserError(
            f"--ray {address}: no Ray cluster let us in within {_JOIN:g} s, expected a running one, with "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN here as they are there"
        )
    if problems:
        # not the error's own words: they may quote what was sent
        kind = type(problems[0]).__name__
        hint = "; set RAY_AUTH_MODE and RAY_AUTH_TOKEN as on the cluster" if "uth" in kind + str(problems[0]) else ""
        raise UserError(f"--ray {address}: the cluster did not let us in ({kind}){hint}") from None
    return ray


def place_of(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for ``auto``. Nothing is opened.

    Raises:
        UserError: another form of address, or Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed; expected pip install 'dpguard[ray]', or a run without --ray")
    if address == "auto":
        return None
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--ray is {address!r}, expected host:port such as 10.0.0.1:6379, ray://host:10001 or auto")
    return host.strip("[]"), int(port)


def reach(address: str) -> None:
    """Open a connection to the address, so that a wrong one is told at once: Ray itself would try for minutes.

    Raises:
        UserError: as `place_of`, or nothing answers there.
    """
    place = place_of(address)
    if place is None:
        return
    try:
        socket.create_connection(place, timeout=_REACH).close()
    except OSError as error:
        raise UserError(
            f"--ray {address}: nothing answers there ({error.strerror or error}), expected a running cluster's head"
        ) from None


def exposed(address: str, environ: Mapping[str, str]) -> str:
    """A warning when the address is beyond this machine and nothing says that the cluster asks for a token, or "".

    >>> exposed("127.0.0.1:6379", {}), exposed("10.0.0.1:6379", {"RAY_AUTH_MODE": "token"})
    ('', '')
    """
    host = address.removeprefix(_CLIENT).rpartition(":")[0].strip("[]")
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    token = mode == "token" or (not mode and ("RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ))
    if address == "auto" or token or _loopback(host):
        return ""
    return (
        f"warning: {address} is not this machine, and no token is set (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN): whoever "
        "reaches an unauthenticated cluster can run code on it and read texts and models"
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
