"""What ``dpguard run --dry-run`` prints: the grid of a study, its epsilons and how much is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dpguard.cli.console import console, table
from dpguard.cli.planning import Planned
from dpguard.cli.searching import Settled
from dpguard.study.grid import plan_table
from dpguard.study.record import Cell
from dpguard.study.search import searches
from dpguard.study.todo import Todo


def print_plan(settled: Settled, folder: Path, own: Sequence[Cell], todo: Todo) -> None:
    """Print the grid of a run's own cells, and what it has to do."""
    planned = settled.planned
    _print_grid(planned, own, todo)
    console().print("The columns after epsilon count cells.", style="dim")
    total = f"{len(own)} cells" if len(own) == len(planned.cells) else f"{len(own)} cells of this shard"
    failed = f", {len(todo.left)} failed that only --retry-failed runs" if todo.left else ""
    console().print(f"{total}, {len(todo.cells)} to run{failed}; records in {folder}", markup=False)
    for label, why in planned.refused.items():
        console().print(f"{label} will not run: {why}", markup=False)
    for search in searches(settled.study):
        auto = search.auto
        told = f"up to {auto.values} values between {auto.low:g} and {auto.high:g}, each after the last is measured"
        console().print(f"{search.label}: {auto.variable} for {auto.target} {auto.aim:g}: {told}", markup=False)
    for sentence in settled.sentences:
        console().print(sentence, markup=False)


def _print_grid(planned: Planned, own: Sequence[Cell], todo: Todo) -> None:
    unfinished = {*(cell.id for cell in todo.cells), *(record.cell.id for record in todo.left)}
    finished = {cell.id for cell in own} - unfinished
    rows = []
    for row in plan_table(planned.study, own, epsilons=planned.epsilons, finished=finished):
        legs = [row.cells[leg] for leg in ("guarantee", "utility", "leakage")]
        rows.append([row.policy, "inf" if math.isinf(row.epsilon) else f"{row.epsilon:.3g}", *legs, row.finished])
    columns = ["policy", "epsilon", "guarantee", "utility", "leakage", "finished"]
    console().print(table(columns, rows, right=columns[1:]))
