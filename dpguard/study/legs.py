"""Runs one cell of a study: guarantee, leakage or utility. Imported by worker processes only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dpguard.study import guarantee_leg, leakage_leg, utility_leg
from dpguard.study.ground import PROVENANCE, Result, SkippedError, device_name, device_of
from dpguard.study.record import Cell, Record, TextRow

LEGS: dict[str, Callable[[Cell, Mapping[str, Any]], Result]] = {
    "guarantee": guarantee_leg.run,
    "leakage": leakage_leg.run,
    "utility": utility_leg.run,
}


def execute(cell: Cell, context: Mapping[str, Any]) -> tuple[Record, list[TextRow]]:
    """Run a cell.

    Args:
        cell: what to run.
        context: ``model`` (name), ``data`` (arguments of `texts.load`), ``folder`` (where the cache is),
            ``cache_gigabytes`` (its room), ``plans`` (policy label -> hash of the resolved policy), ``device``
            (``cuda`` when this worker was given one), ``need_device`` (whether to fail when it cannot be used).

    Returns:
        The record, done or skipped with its reason, and its texts. Anything unexpected is raised: the
        runner makes it a failed record.
    """
    started = time.perf_counter()
    leg = LEGS[cell.leg]
    try:
        result, rows = leg(cell, context)
        status, reason = "done", ""
    except SkippedError as skip:
        result, rows, status, reason = {}, [], "skipped", str(skip)
    provenance = {
        "seconds": round(time.perf_counter() - started, 3),
        "device": device_name(device_of(context) if cell.leg == "utility" else "cpu"),
        "plan": context.get("plans", {}).get(cell.policy),
        **result.pop(PROVENANCE, {}),
    }
    return Record(cell, status, reason, result, provenance), rows  # type: ignore[arg-type]
