"""A study's records without running one: two policies, all three legs, a model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpguard.engine.accounting import guarantee
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from dpguard.study.record import Cell, Record
from dpguard.study.store import Store
from tests import tiny

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]
TABLES: dict[str, list[dict[str, Any]]] = {"none": [], "dp": DP, "adaptive": [{**DP[0], "clip": {"quantile": 0.5}}]}
EXAMPLES, BATCH, STEPS = 32, 8, 8


def home(folder: Path) -> Path:
    """A model and texts on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.module("bert", width=16, blocks=2).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    words = tiny.WORDS
    rows = [{"text": " ".join(words[3 * i % 50 : 3 * i % 50 + 3 + i % 4]), "label": i % 2} for i in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def study(
    folder: Path, place: Path, *, threat: dict[str, Any] | None = None, federation: dict[str, Any] | None = None,
    leakage: bool = True, caps: dict[str, float] | None = None,
) -> Path:  # fmt: skip
    """Records in ``folder`` of the model in ``place``."""
    loaded = models.load(str(place / "model"), labels=2, seed=0)
    model = {"name": str(place / "model"), "hash": loaded.fingerprint}
    data = {"name": "texts", "hash": "0", "train": EXAMPLES, "test": 8}
    more = {"federation": federation} if federation else {}
    cells, records = [], []
    for number, (name, rows) in enumerate(TABLES.items()):
        plan = Policy(rows).plan(slots(loaded.module))
        found = guarantee(plan, sampling_rate=BATCH / EXAMPLES, steps=STEPS, delta=1e-3)
        claim = {
            "epsilon": found.epsilon if found.formal else "inf", "sigma_eff": found.sigma_eff, "delta": 1e-3,
            "sampling_rate": BATCH / EXAMPLES, "steps": STEPS, "statement": found.statement,
            "reasons": list(found.reasons), "shared_fraction": 1.0, "table": [], "bound": None, "bounds": [],
        }  # fmt: skip
        cells.append(
            Cell("guarantee", name, rows, model, data, {"steps": STEPS, "delta": 1e-3, "examples": EXAMPLES, **more})
        )
        records.append(Record(cells[-1], "done", result=claim))
        cells.append(
            Cell(
                "utility",
                name,
                rows,
                model,
                data,
                {"batch_size": BATCH, "learning_rate": 0.01, "optimizer": "adam", **more},
            )
        )
        records.append(
            Record(cells[-1], "done", result={"predictions": [0, 1, 1, 0], "labels": [0, 1, 0, 1], "metrics": {}})
        )
        if not leakage:
            continue
        cells.append(
            Cell(
                "leakage",
                name,
                rows,
                model,
                data,
                {
                    "at": "start",
                    "batch_size": 1,
                    "targets": 4,
                    "panel": {"name": "p", "hash": "h"},
                    "threat": threat or {},
                    **more,
                },
            )
        )
        scores = [
            {"target": t, "attack": attack, "metrics": {"rougeL": value, "exact_match": float(value == 1.0)}}
            for t in range(8)
            for attack, value in (("prior", 0.1), ("span", (1.0, 0.3, 0.4)[number]))
        ]
        records.append(
            Record(cells[-1], "done", result={"scores": scores, "messages": 8, "shared_fraction": 1.0, "skipped": {}})
        )
    caps = caps or {"max_leakage": 0.9, "max_epsilon": 100}
    spec = {"policies": list(TABLES), "question": "Q?", "recommend": caps, **more}
    with Store.open(folder, create=True) as store:
        store.set_study("s", "name: s", spec, cells)
        for record in records:
            store.put(record)
    return folder
