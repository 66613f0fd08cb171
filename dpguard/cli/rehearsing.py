"""What ``dpguard run --dry-run`` prints: the grid of a study, its epsilons and how much is left."""

from __future__ import annotations

import math
from pathlib import Path

from dpguard.cli.console import console, table
from dpguard.cli.planning import Planned
from dpguard.cli.searching import Settled
from dpguard.study.grid import plan_table
from dpguard.study.search import searches
from dpguard.study.store import FILE, Store


def print_plan(settled: Settled, folder: Path, own: frozenset[str], finished: frozenset[str]) -> frozenset[str]:
    """Print the grid; the ids of the cells that are left."""
    planned = settled.planned
    _print_grid(planned, own, finished)
    left = frozenset(own - finished)
    console().print("The columns after epsilon count cells.", style="dim")
    total = f"{len(planned.cells)} cells" if len(own) == len(planned.cells) else f"{len(own)} cells of this shard"
    console().print(f"{total}, {len(left)} to run; records in {folder}", markup=False)
    for label, why in planned.refused.items():
        console().print(f"{label} will not run: {why}", markup=False)
    for search in searches(settled.study):
        auto = search.auto
        told = f"up to {auto.values} values between {auto.low:g} and {auto.high:g}, each after the last is measured"
        console().print(f"{search.label}: {auto.variable} for {auto.target} {auto.aim:g}: {told}", markup=False)
    for sentence in settled.sentences:
        console().print(sentence, markup=False)
    return left


def finished_in(folder: Path) -> frozenset[str]:
    """Ids of the cells that a folder's store holds; none where there is no store."""
    if not (folder / FILE).exists():
        return frozenset()
    with Store.open(folder) as store:
        return frozenset(store.done_ids())


def _print_grid(planned: Planned, own: frozenset[str], finished: frozenset[str]) -> None:
    cells = [cell for cell in planned.cells if cell.id in own]
    rows = []
    for row in plan_table(planned.study, cells, epsilons=planned.epsilons, finished=finished):
        legs = [row.cells[leg] for leg in ("guarantee", "utility", "leakage")]
        rows.append([row.policy, "inf" if math.isinf(row.epsilon) else f"{row.epsilon:.3g}", *legs, row.finished])
    columns = ["policy", "epsilon", "guarantee", "utility", "leakage", "finished"]
    console().print(table(columns, rows, right=columns[1:]))
