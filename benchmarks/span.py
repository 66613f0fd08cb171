"""How fast and how exactly one shared weight gives a sentence away, beside gradient matching on the same message.

    python benchmarks/span.py [--n 20] [--weight query] [--block 3] [--data cola] [--partial 2]

MiniLM, one thread, no label, no length and no public text disclosed to `span`. `partial` is the preset of
`match` with the setting of the paper that started this project (arXiv 2406.00999); it is told labels and
lengths, as it was there. Texts: $DPGUARD_DATA, or ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score import rouge_scorer

from dpguard.attacks import panel
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine import gradients
from dpguard.inputs import models
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Plan, Policy

SELECTORS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "mlp_in": "mlp.in",
    "mlp_out": "mlp.out",
}
DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SEED = 101


def texts(name: str, count: int) -> list[dict[str, Any]]:
    """The first ``count`` rows of a shuffled training set."""
    rows = [json.loads(line) for line in (DATA / f"{name}.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    return rows[:count]


def observe(model: models.LoadedModel, plan: Plan, row: dict[str, Any], *, told: bool) -> tuple[Observation, list[int]]:
    """One sentence's message under a plan without clip and noise, and its true token ids."""
    batch = collate([row["text"]], [row["label"]], model.tokenizer)
    wanted = [name for name in plan.shared if name.endswith(".weight")]
    with gradients.running_as(model.module, "eval"):
        message = gradients.gradient(model.module, batch, wanted)
    ids = batch.input_ids[0].tolist()
    known = Disclosed(
        model.tokenizer, plan, 1, labels=(row["label"],) if told else None, lengths=(len(ids),) if told else None
    )
    return Observation(message, model.module, known), ids


class Table:
    """Seconds and scores of one attack, a row printed for every sentence."""

    def __init__(self, model: models.LoadedModel, attack: str) -> None:
        self.model, self.attack = model, attack
        self.scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2"])
        self.rows: list[tuple[float, bool, bool, float, float]] = []

    def run(self, plan: Plan, row: dict[str, Any], *, told: bool) -> None:
        seen, true = observe(self.model, plan, row, told=told)
        start = time.perf_counter()
        found = panel.attack(self.attack).reconstruct(seen, seed=0)
        seconds = time.perf_counter() - start
        guess = found.sequences[0] if found.sequences else []
        plain = [self.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (true, guess)]
        score = self.scorer.score(*plain)
        exact, certain = guess == true, found.certain == [True]
        self.rows.append((seconds, exact, certain, score["rouge1"].fmeasure, score["rouge2"].fmeasure))
        print(f"  {seconds:7.2f} s  exact {exact:d}  certain {certain:d}  {len(true):3d} tokens", flush=True)

    @property
    def median(self) -> float:
        """Median seconds a sentence."""
        return statistics.median(row[0] for row in self.rows)

    def summary(self) -> str:
        seconds, exact, certain, one, two = (np.array(column, dtype=float) for column in zip(*self.rows, strict=True))
        wrong = int(((certain == 1) & (exact == 0)).sum())
        return (
            f"{self.attack:15s} n {len(seconds):3d}  median {np.median(seconds):7.2f} s  95th percentile "
            f"{np.quantile(seconds, 0.95):7.2f} s  exact {exact.mean():.3f}  R-1 {one.mean():.3f}  R-2 {two.mean():.3f}"
            f"  certain {certain.mean():.3f}  certain and wrong {wrong}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20, help="sentences for span")
    parser.add_argument("--weight", choices=SELECTORS, default="query")
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--data", choices=["cola", "rotten_tomatoes"], default="cola")
    parser.add_argument("--partial", type=int, default=2, help="sentences for match:partial (minutes each); 0 = none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load("minilm")
    plan = Policy.load(f"block[{options.block}].{SELECTORS[options.weight]}").plan(slots(model.module))
    rows = texts(options.data, max(options.n, options.partial))
    print(f"MiniLM, {options.data}, block {options.block}, {options.weight} only, one thread")
    tables = []
    for attack, count, told in (("span", options.n, False), ("match:partial", options.partial, True)):
        if not count:
            continue
        print(attack)
        tables.append(Table(model, attack))
        for row in rows[:count]:
            tables[-1].run(plan, row, told=told)
    for table in tables:
        print(table.summary())
    if len(tables) == 2:
        print(f"median seconds, match:partial over span: {tables[1].median / tables[0].median:.0f}")


if __name__ == "__main__":
    main()
