"""What parts of like length save: CPU seconds of training steps with and without, on the same batches of real texts.

    python benchmarks/parts.py [--data rotten_tomatoes] [--repeats 2]

MiniLM, one thread, same seed and so the same batches; medians of interleaved repeats, ratios beside them. Texts:
$DPGUARD_DATA, or ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.inputs import models
from dpguard.inputs.batch import collate
from dpguard.policy.table import Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
PLAIN: list[dict[str, Any]] = []
DP = [{"layers": "all", "clip": 0.1, "noise": 1.0}]
CASES = {"plain, batch 32": (PLAIN, 32, 8), "DP-SGD, batch 32": (DP, 32, 8), "DP-SGD, batch 512": (DP, 512, 1)}


def seconds(texts: list[tuple[str, int]], rows: list[dict[str, Any]], batch: int, steps: int, like: bool) -> float:
    """CPU seconds of a step."""
    loaded = models.load("minilm", labels=2, seed=0)
    module = loaded.module.train()
    lengths = [len(ids) for ids in loaded.tokenizer([t for t, _ in texts])["input_ids"]] if like else None

    def padded(items: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        found = collate([t for t, _ in items], [y for _, y in items], loaded.tokenizer)
        return {"input_ids": found.input_ids, "attention_mask": found.attention_mask, "labels": found.labels}

    engine = PrivacyEngine()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)
    module, private, loader = engine.make_private(
        module=module, optimizer=optimizer, policy=Policy(rows), seed=1, max_physical_batch_size=64, lengths=lengths,
        data_loader=DataLoader(texts, batch_size=batch, collate_fn=padded),  # type: ignore[arg-type]
    )  # fmt: skip
    started = time.process_time()
    for part in loader:
        private.zero_grad()
        if len(part["labels"]):
            module(**part).loss.backward()
        private.empty = not len(part["labels"])
        private.step()
        if engine.steps == steps:
            break
    engine.close()
    return (time.process_time() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["cola", "rotten_tomatoes"], default="rotten_tomatoes")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = (DATA / f"{given.data}.train.jsonl").read_text("utf-8").splitlines()
    texts = [(row["text"], row["label"]) for row in map(json.loads, lines)]
    for name, (rows, batch, steps) in CASES.items():
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.repeats):
            for like in found:
                found[like].append(seconds(texts, rows, batch, steps, like))
        before, after = (statistics.median(found[like]) for like in found)
        print(f"{given.data}, {name:18s} {before:6.2f} -> {after:6.2f} s a step, {before / after:.2f} x", flush=True)


if __name__ == "__main__":
    main()
