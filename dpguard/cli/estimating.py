"""The time line of ``dpguard run --dry-run``. No torch here: the probes run in workers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from dpguard.cli.console import console
from dpguard.study import probe
from dpguard.study.executor import Limits
from dpguard.study.record import Cell
from dpguard.study.runner import usable_cores
from dpguard.study.workers import Workers, warm_up


def print_estimate(
    cells: Sequence[Cell],
    execute: str,
    context: Mapping[str, Any],
    workers: int | None,
    threads: int,
    preload: Sequence[str],
    devices: Sequence[str] = (),
) -> None:
    """Say how long the cells will take, from short real probes in worker processes; nothing is stored."""
    places = workers or max(1, usable_cores() // threads)
    waits = console().status("probing short cells") if console().is_terminal else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, waits:
        probed = {**context, "keep_weights": [], "folder": folder}

        def embedded() -> Workers:
            warm_up(preload, threads)
            limits = Limits(minutes=probe.MINUTES)
            return Workers(execute, probed, places, limits=limits, threads=threads, devices=devices)

        found = probe.estimate(cells, embedded)
    console().print(f"{found.sentence}; {places} side by side", markup=False)
