"""The study runner: side by side against one worker, overhead a cell, resuming 10,000 records, the store's size.

    python benchmarks/runner.py speed [--cells 60] [--repeat 3]    # real short cells: guarantees on the demo model
    python benchmarks/runner.py resume [--records 10000]           # records of real cells, once for each seed

Others may use the same cores meanwhile. So wall-clock ratios come with the load of the machine, and the overhead is
also counted in CPU seconds of all processes of the run, which waiting for a core does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

from dpguard.cli.planning import plan_study
from dpguard.cli.studies import EXECUTE, PRELOAD
from dpguard.documents import Document
from dpguard.study.record import Record, TextRow
from dpguard.study.runner import run
from dpguard.study.spec import Study
from dpguard.study.store import FILE, Store

TEXT = """\
name: short-cells
model: demo
data: demo
policies: {{dp: {{sweep: {{noise: [{noises}]}}, rows: [{{layers: all, clip: 1.0, noise: $noise}}]}}}}
leakage: {{panel: demo, targets: 12}}
utility: {{epochs: 1, batch_size: 64, learning_rate: 2.0e-3}}
"""
RESUME = """
import json, sys, time
started = time.perf_counter()
from dpguard.study.runner import run
from dpguard.study.spec import Study
from dpguard.study.store import Store
from dpguard.study.record import Cell
study = Study.load(sys.argv[1])
with Store.open(sys.argv[2]) as store:
    cells = store.planned()
imported, cpu = time.perf_counter(), time.process_time()
summary = run(study, sys.argv[2], cells, execute="no:where", quiet=True)
print(json.dumps({"run": time.perf_counter() - imported, "run_cpu": time.process_time() - cpu,
                  "cpu": time.process_time(), "all": time.perf_counter() - started,
                  "resumed": summary.resumed}))
"""


def cpu_of_tree() -> float:
    """CPU seconds of this process and of the worker server with all workers that have ended."""
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)
    total = sum(os.times()[:2])
    if server:
        fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return total


def once(study: Study, planned, cells, workers: int) -> dict[str, float]:
    """Wall and CPU of a run after start-up: the server is warm, what cells share is made."""
    with tempfile.TemporaryDirectory() as folder:
        context = {**planned.context, "folder": folder}
        options = {"execute": EXECUTE, "context": context, "workers": workers, "preload": PRELOAD, "quiet": True}
        run(study, Path(folder) / "warm", cells[:1], **options)
        started, cpu = time.perf_counter(), cpu_of_tree()
        summary = run(study, folder, cells[1:], **options)
        wall, cpu = time.perf_counter() - started, cpu_of_tree() - cpu
        assert summary.done == len(cells) - 1, summary.sentence
        with Store.open(folder) as store:
            took = [record.provenance for record in store.records()]
    inside = sum(p["seconds"] for p in took)
    return {
        "wall": wall,
        "wall_inside": inside,
        "overhead_wall": (wall - inside / workers) / len(took),
        "overhead_cpu": (cpu - sum(p["cpu_seconds"] for p in took)) / len(took),
        "cpu_inside": sum(p["cpu_seconds"] for p in took) / len(took),
    }


def speed(cells: int, repeat: int) -> None:
    noises = ", ".join(f"{0.3 + 0.01 * n:.2f}" for n in range(cells))
    study = Study.read(Document.parse(TEXT.format(noises=noises), "runner.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_study(study, Path(folder))
    chosen = [cell for cell in planned.cells if cell.leg == "guarantee"][: cells + 1]
    for number in range(repeat):
        one, two = (once(study, planned, chosen, workers) for workers in (1, 2))
        print(
            json.dumps(
                {
                    "cells": cells,
                    "ratio_wall": round(one["wall"] / two["wall"], 3),
                    "seconds_one": round(one["wall"], 2),
                    "seconds_two": round(two["wall"], 2),
                    "cell_cpu": round(one["cpu_inside"], 3),
                    "overhead_wall_a_cell": round(one["overhead_wall"], 3),
                    "overhead_cpu_a_cell": round(one["overhead_cpu"], 3),
                    "cpu_wait": round(1 - one["cpu_inside"] * cells / one["wall_inside"], 2),
                    "load": os.getloadavg()[0],
                    "repeat": number,
                }
            ),
            flush=True,
        )


def resume(records: int) -> None:
    study = Study.read(Document.parse(TEXT.format(noises="0.5"), "runner.yaml"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "runner.yaml"
        path.write_text(study.text)
        planned = plan_study(study, folder)
        dp = [cell for cell in planned.cells if cell.policy != "none"]
        run(study, folder / "real", dp, execute=EXECUTE, context=planned.context, preload=PRELOAD)
        with Store.open(folder / "real") as store:
            real = [(record, store.texts(record.cell.id)) for record in store.records()]
        made: list[tuple[Record, list[TextRow]]] = []
        for seed in range(-(-records // len(real))):
            for record, texts in real:
                cell = replace(record.cell, seed=1000 + seed, policy=f"{record.cell.policy} {seed}")
                made.append((replace(record, cell=cell), texts))
        made = made[:records]
        with Store.open(folder / "many", create=True) as store:
            store.set_study(study.name, study.text, study.plain(), [record.cell for record, _ in made])
            for first in range(0, records, 500):
                store.put_all(made[first : first + 500])
        size = (folder / "many" / FILE).stat().st_size
        texts = sum(len(row.text) for _, rows in made for row in rows)
        sizes = {record.cell.leg: len(json.dumps(record.result)) for record, _ in real}
        print(json.dumps({"records": records, "store_mb": round(size / 1e6, 1), "texts_mb": round(texts / 1e6, 1),
                          "json_bytes": sizes}))  # fmt: skip
        for _ in range(3):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", RESUME, str(path), str(folder / "many")], capture_output=True, check=True
            )
            user = json.loads(done.stdout)
            print(
                json.dumps({**user, "process": time.perf_counter() - started, "load": os.getloadavg()[0]}), flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "resume"])
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--records", type=int, default=10_000)
    asked = parser.parse_args()
    if asked.what == "speed":
        speed(asked.cells, asked.repeat)
    else:
        resume(asked.records)
