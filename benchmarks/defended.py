"""What pruning, rounding and dropout hide from gradient matching that knows of them: nothing, or how little.

    python benchmarks/defended.py [--n 10] [--first 0] [--seed 101] [--defence keep.1 1bit ...] [--preset default]

MiniLM, CoLA, batch 1, one thread, everything but embeddings shared. `--preset` runs a published attack beside the
default on the same messages (dlg, tag, lamp, partial: minutes to an hour each; `--told "label length"` is what their
papers assume). Texts: $DPGUARD_DATA, or ../shared/data beside the checkout.
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

import torch
from rouge_score import rouge_scorer

from dpguard.attacks import panel
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine.client import Client
from dpguard.inputs import models
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
DEFENCES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "eval"),
    "keep.1": ({"keep": 0.1}, "eval"),
    "keep.01": ({"keep": 0.01}, "eval"),
    "8bit": ({"bits": 8}, "eval"),
    "4bit": ({"bits": 4}, "eval"),
    "1bit": ({"bits": 1}, "eval"),
    "dropout": ({}, "train"),
}


def texts(seed: int, count: int) -> list[tuple[str, int]]:
    """The first distinct training sentences in a random order."""
    rows = [json.loads(line) for line in (DATA / "cola.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    return list({row["text"]: (row["text"], row["label"]) for row in rows}.values())[:count]


def observe(
    model: models.LoadedModel, defence: str, text: tuple[str, int], number: int, told: str
) -> tuple[Observation, list[int]]:
    """One sentence's message under a defence, and its true token ids."""
    columns, mode = DEFENCES[defence]
    rows = [{"layers": "all", **columns}] if columns else []
    plan = Policy([*rows, {"layers": "embeddings", "share": False}]).plan(slots(model.module))
    batch = collate([text[0]], [text[1]], model.tokenizer)
    update = Client(model.module, plan, seed=number, mode=mode, dropout_seed=number).observe(batch)
    ids = batch.input_ids[0].tolist()
    disclosed = Disclosed(
        model.tokenizer, plan, update.batch_size, mode=mode,
        labels=(text[1],) if "label" in told else None, lengths=(len(ids),) if "length" in told else None,
    )  # fmt: skip
    return Observation(update.tensors, model.module, disclosed), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10, help="sentences for each defence")
    parser.add_argument("--first", type=int, default=0, help="sentences left out before them")
    parser.add_argument("--seed", type=int, default=101, help="of the texts")
    parser.add_argument("--defence", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--preset", default="default", help="of match")
    parser.add_argument("--told", default="", help='what is disclosed: "", "label", "length" or "label length"')
    parser.add_argument("--show", action="store_true", help="print every sentence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, scorer = models.load("minilm"), rouge_scorer.RougeScorer(["rouge1", "rouge2"])
    which = f"{options.n} sentences from {options.first} on, seed {options.seed}"
    print(f"match:{options.preset}, {which}, told: {options.told or 'nothing'}")
    print("defence    n   R-1    R-2    exact  certain  certain and wrong  CPU s median  largest")
    for defence in options.defence:
        rows = []
        for number, text in list(enumerate(texts(options.seed, options.first + options.n)))[options.first :]:
            seen, true = observe(model, defence, text, number, options.told)
            begun = time.process_time()
            found = panel.attack(f"match:{options.preset}").reconstruct(seen, seed=number)
            seconds = time.process_time() - begun
            plain = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (true, found.sequences[0])]
            score = scorer.score(*plain)
            exact, certain = found.sequences[0] == true, found.certain[0]
            rows.append((score["rouge1"].fmeasure, score["rouge2"].fmeasure, exact, certain, certain > exact, seconds))
            if options.show:
                print(f"  {seconds:6.1f} s  {exact:d} {certain:d}  {plain[0]} | {plain[1]}", flush=True)
        r1, r2, exact, certain, wrong = (statistics.mean(column) for column in list(zip(*rows, strict=True))[:5])
        seconds_each = [row[5] for row in rows]
        print(
            f"{defence:9s} {len(rows):3d}  {r1:.3f}  {r2:.3f}  {exact:.3f}  {certain:.3f}    "
            f"{round(wrong * len(rows)):3d}                {statistics.median(seconds_each):6.1f}        "
            f"{max(seconds_each):6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
