"""Runs one cell where it is called, and makes a record of whatever comes out. No torch here.

Every executor calls `perform`, in a process where nothing else runs meanwhile.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.executor import Answer
from dpguard.study.record import Cell, Record, TextRow, canonical, encodable

Execute = Callable[[Cell, Mapping[str, Any]], tuple[Record, Sequence[TextRow]]]

FAILURES = ("raised", "crashed", "killed", "time", "memory")
"""Kinds of failure, ``provenance["failure"]``: an exception; the process ended itself or by a fault of its own;
somebody else ended it (such a cell is missing work and runs again); a limit of the study."""


def perform(cell: Cell, execute: str, context: Mapping[str, Any]) -> Answer:
    """Run a cell in this process.

    Args:
        cell: what to run.
        execute: ``module:function`` or ``path/to/file.py:function``, called with the cell and the context.
        context: plain data that every cell gets.

    Returns:
        The record, with what it took (``started``, ``seconds``, ``cpu_seconds``, ``peak_mb``) unless ``execute`` said
        so itself, and its texts. Any exception becomes a failed record with its reason and traceback.
    """
    started, clock, cpu = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter(), _cpu_seconds()
    record, texts = _performed(cell, execute, context)
    spent: dict[str, Any] = {
        "started": started,
        "seconds": round(time.perf_counter() - clock, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    return dataclasses.replace(record, provenance={**spent, **record.provenance}), texts


def failed(cell: Cell, failure: str, reason: str, **more: Any) -> Answer:
    """The answer of a cell that could not give one itself; ``failure`` is one of `FAILURES`."""
    return Record(cell, "failed", reason, provenance={"failure": failure, **more}), []


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


def _performed(cell: Cell, execute: str, context: Mapping[str, Any]) -> Answer:
    try:
        record, texts = function(execute)(cell, context)
        if record.cell.id != cell.id:
            raise ValueError(f"{execute} answered cell {cell.id} with a record of cell {record.cell.id}")
        canonical(dataclasses.asdict(record))  # a tensor or a NaN in a record is this cell's failure
        return record, list(texts)
    except Exception as error:
        message = encodable(" ".join(str(error).split())[:500])
        reason = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
        return failed(cell, "raised", reason, traceback=traceback.format_exc())


def _cpu_seconds() -> float:
    """Of this process and the children that it has waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
