"""Cells whose leakage and utility fall with the noise of their table, without torch."""

from __future__ import annotations

from dpguard.study.grid import describe
from dpguard.study.record import Record


def execute(cell, context):
    with open(context["log"], "a", encoding="utf-8") as log:
        log.write(f"{cell.id} {describe(cell)}\n")
    if context.get("fail") and context["fail"] in describe(cell):
        raise ValueError("a deliberate failure")
    noise = max((row.get("noise", 0.0) for row in cell.table), default=0.0)
    leakage, accuracy = 1 / (1 + noise / 0.2), 0.9 / (1 + noise / 3)
    if cell.leg == "guarantee":
        return Record(cell, "done", result={"epsilon": 5 / noise if noise else "inf"}), []
    if cell.leg == "utility":
        return Record(cell, "done", result={"metrics": {"accuracy": accuracy}, "predictions": [1], "labels": [1]}), []
    scores = [
        {"target": target, "attack": attack, "metrics": {"rougeL": level + shift, "exact_match": 0.0}}
        for attack, level in (("prior", 0.05), ("span", leakage))
        for target, shift in ((0, 0.0), (1, 0.02 * (cell.seed + 1)))
    ]
    return Record(cell, "done", result={"scores": scores, "at": cell.settings["at"]}), []
