"""How exactly and how fast a whole batch is read from one gradient with the embeddings withheld.

    python benchmarks/batches.py [--data cola] [--batch-size 2 4 8 16] [--n 20] [--bfloat16] [--share LAYERS]

MiniLM, one thread; neither labels nor lengths nor the number of texts are disclosed. Batch k holds rows
k * B to (k + 1) * B of the shuffled training set (seed 101). Texts: $DPGUARD_DATA, or ../shared/data beside
the checkout. Published for comparison (BERT, Rotten Tomatoes, batch 2, 4, 8): R-2 .965, .501, .114 in 5
minutes, half an hour and 2 hours a batch on a GPU (arXiv 2405.15586).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score import rouge_scorer
from scipy.optimize import linear_sum_assignment

from dpguard.attacks import panel
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine import gradients
from dpguard.inputs import models
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Plan, Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SEED = 101


@dataclass(frozen=True)
class Row:
    """One batch: how much of it was read, and in which time."""

    exact: float
    certain: float
    wrong: int
    one: float
    two: float
    seconds: float
    cpu: float


def texts(name: str) -> list[dict[str, Any]]:
    """The shuffled training set."""
    rows = [json.loads(line) for line in (DATA / f"{name}.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    return rows


def observe(
    model: models.LoadedModel, plan: Plan, rows: Sequence[dict[str, Any]], *, rounded: bool
) -> tuple[Observation, list[list[int]]]:
    """One batch's message under a plan without clip and noise, and its true token ids."""
    batch = collate([row["text"] for row in rows], [row["label"] for row in rows], model.tokenizer)
    wanted = [name for name in plan.shared if name.endswith(".weight")]
    with gradients.running_as(model.module, "eval"):
        sums = gradients.gradient(model.module, batch, wanted)
    message = {name: total / len(rows) for name, total in sums.items()}
    if rounded:
        message = {name: value.bfloat16().float() for name, value in message.items()}
    lengths = batch.attention_mask.sum(1).tolist()
    true = [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
    return Observation(message, model.module, Disclosed(model.tokenizer, plan, len(rows), sequences=None)), true


def judge(tokenizer: Any, true: list[list[int]], found: list[list[int]]) -> tuple[float, float, float]:
    """Share of texts found exactly, and mean R-1 and R-2, each true text matched with one found text at most."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2"])
    plain = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in (true, found)]
    table = np.zeros((len(true), max(1, len(found)), 3))
    for i, text in enumerate(plain[0]):
        for j, guess in enumerate(plain[1]):
            score = scorer.score(text, guess)
            table[i, j] = true[i] == found[j], score["rouge1"].fmeasure, score["rouge2"].fmeasure
    rows, columns = linear_sum_assignment(-table.sum(2))
    exact, one, two = table[rows, columns].sum(0) / len(true)
    return float(exact), float(one), float(two)


def run(model: models.LoadedModel, plan: Plan, rows: Sequence[dict[str, Any]], *, rounded: bool) -> Row:
    """Attack one batch."""
    seen, true = observe(model, plan, rows, rounded=rounded)
    attack = panel.attack("span")
    reason = attack.applicable(seen)
    if reason:
        raise SystemExit(f"span: {reason}")
    start, busy = time.perf_counter(), time.process_time()
    found = attack.reconstruct(seen, seed=0)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    sure = [ids for ids, certain in zip(found.sequences, found.certain, strict=True) if certain]
    wrong = sum(ids not in true for ids in sure)
    exact, one, two = judge(model.tokenizer, true, found.sequences)
    print(
        f"  {seconds:7.2f} s (CPU {cpu:.2f})  exact {exact:.2f}  certain {len(sure):2d}  wrong {wrong}  "
        f"{sum(map(len, true)):3d} tokens  {found.notes}",
        flush=True,
    )
    return Row(exact, len(sure) / len(true), wrong, one, two, seconds, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["cola", "rotten_tomatoes"], default="cola")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--n", type=int, default=20, help="batches of each size")
    parser.add_argument("--first", type=int, default=0, help="index of the first batch")
    parser.add_argument("--bfloat16", action="store_true", help="the message is rounded to bfloat16")
    parser.add_argument(
        "--share", default="", help="share these layers only, e.g. block[0]; default: all but embeddings"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load("minilm")
    policy = Policy.load(options.share) if options.share else Policy([{"layers": "embeddings", "share": False}])
    plan = policy.plan(slots(model.module))
    rows = texts(options.data)
    lines = []
    for size in options.batch_size:
        print(f"{options.data}, batch {size}{', bfloat16' if options.bfloat16 else ''}")
        parts = [rows[k * size : (k + 1) * size] for k in range(options.first, options.first + options.n)]
        table = [run(model, plan, part, rounded=options.bfloat16) for part in parts]
        exact, certain, one, two = (
            float(np.mean([getattr(r, c) for r in table])) for c in ("exact", "certain", "one", "two")
        )
        seconds = [r.seconds for r in table]
        lines.append(
            f"| {options.data} | {size} | {len(table)} | {exact:.3f} | {one:.3f} | {two:.3f} | {certain:.3f} | "
            f"{sum(r.wrong for r in table)} | {np.median(seconds):.1f} | {np.quantile(seconds, 0.95):.1f} | "
            f"{np.median([r.cpu for r in table]):.1f} |"
        )
    print("| data | batch | n | exact | R-1 | R-2 | certain | certain and wrong | median s | p95 s | median CPU s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
