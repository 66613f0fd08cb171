"""What the panel's attacks recover, row by row of the goals in README.md: each line is one cell, measured.

    python benchmarks/attacks.py single [--weights query value] [--blocks 0 3] [--data cola] [--n 100] [--first 0]
    python benchmarks/attacks.py update | lora | wide | last | head [--n 10]
    python benchmarks/attacks.py controls [--n 20]        another text's message; shuffled entries; pure noise
    python benchmarks/attacks.py partial [--n 2]          the seed paper's matching beside span, the same messages

MiniLM, one thread, seed 101; neither labels nor lengths are disclosed (`partial` is told both, as in its paper).
Whole batches: batches.py. Decoders: decoders.py. Pruned, rounded, dropout: defended.py. Noise: likelihood.py.
Texts: $DPGUARD_DATA, or ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpguard.attacks import panel
from dpguard.attacks.observation import Observation
from dpguard.attacks.panel import Outcome
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.texts import Corpus, Example
from dpguard.measure import leakage
from dpguard.measure.threat import Threat
from dpguard.measure.truth import Truth
from dpguard.policy.table import Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SEED = 101
WEIGHTS = {
    "query": "attention.query", "key": "attention.key", "value": "attention.value", "output": "attention.output",
    "mlp_in": "mlp.in", "mlp_out": "mlp.out",
}  # fmt: skip
WITHHELD = [{"layers": "embeddings", "share": False}]
PUBLIC = 2_000


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        name: what is printed.
        rows: of the policy.
        data: cola or rotten_tomatoes.
        attack: name in the panel.
        batch_size: texts a client.
        n: messages.
        first: messages left out before them.
        threat: what the message is, and what is disclosed.
        lora: rank of LoRA on query and value instead of the bare model, 0 = none.
        first_message: LoRA as it is before its first step.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    data: str = "cola"
    attack: str = "span"
    batch_size: int = 1
    n: int = 10
    first: int = 0
    threat: Threat = field(default_factory=Threat)
    lora: int = 0
    first_message: bool = False


def corpus(name: str) -> Corpus:
    """The shuffled training set; its last texts are public, so no target is among them."""
    lines = (DATA / f"{name}.train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(SEED).shuffle(rows)
    examples = [Example(row["text"], row["label"]) for row in rows]
    return Corpus(name, tuple(examples[:-PUBLIC]), (), tuple(e.text for e in examples[-PUBLIC:]))


def with_lora(rank: int, *, first: bool) -> models.LoadedModel:
    """MiniLM with LoRA on query and value; B is zero before the first step, drawn here as after some training."""
    loaded = models.load(f"minilm+lora{rank}", seed=SEED)
    source = torch.Generator().manual_seed(SEED)
    for name, parameter in loaded.module.named_parameters():
        if "lora_B" in name and not first:
            parameter.data.normal_(std=0.02, generator=source)
    return loaded


@dataclass
class Result:
    """Scores and CPU seconds of a cell's messages."""

    cell: Cell
    scores: list[leakage.Score]
    seconds: list[float]

    def line(self) -> str:
        """The line that is printed."""

        def mean(metric: str) -> float:
            return float(np.mean([s.metrics[metric] or 0.0 for s in self.scores])) if self.scores else float("nan")

        sure = [s for s in self.scores if s.certain]
        wrong = sum(not s.metrics["exact_match"] for s in sure)
        times = f"median {statistics.median(self.seconds):6.1f} s  p95 {np.quantile(self.seconds, 0.95):6.1f} s"
        means = "  ".join(
            f"{k} {mean(m):.3f}" for k, m in (("exact", "exact_match"), ("R-1", "rouge1"), ("R-2", "rouge2"))
        )
        share = len(sure) / max(1, len(self.scores))
        return f"{self.cell.name:32s} n {len(self.seconds):3d}  {means}  certain {share:.3f}  wrong {wrong}  {times}"


def messages(cell: Cell) -> list[tuple[models.LoadedModel, Observation, Truth, list[int]]]:
    """The messages of a cell with their truths."""
    texts, model = (
        corpus(cell.data),
        with_lora(cell.lora, first=cell.first_message) if cell.lora else models.load("minilm"),
    )
    plan = Policy(list(cell.rows)).plan(slots(model.module))
    size = cell.batch_size * cell.threat.clients
    out = []
    picked = leakage.pick_targets(texts, targets=cell.first + cell.n, batch_size=size, seed=0)
    for number, indices in list(enumerate(picked))[cell.first :]:
        examples = [texts.train[i] for i in indices]
        each = [examples[i : i + cell.batch_size] for i in range(0, len(examples), cell.batch_size)]
        batches = [leakage.encode(model, part) for part in each]
        update = cell.threat.message(model, plan, batches, noise_seed=number)
        lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(1)]
        seen = leakage.observation(
            model, plan, update, public=texts.public, sequences=size if cell.threat.knows("count") else None,
            labels=[e.label for e in examples] if cell.threat.knows("labels") else None,
            lengths=lengths if cell.threat.knows("lengths") else None,
        )  # fmt: skip
        out.append((model, seen, Truth.of(examples, model.tokenizer), indices))
    return out


def run(cell: Cell, *, quiet: bool = False) -> Result:
    """Attack every message of a cell."""
    result = Result(cell, [], [])
    attack = panel.attack(cell.attack)
    for model, seen, truth, indices in messages(cell):
        reason = attack.applicable(seen)
        if reason:
            print(f"{cell.name:34s} skipped: {reason}", flush=True)
            return result
        started = time.process_time()
        found = attack.reconstruct(seen, seed=0)
        result.seconds.append(time.process_time() - started)
        result.scores += leakage.judge(Outcome(cell.attack, found), truth, indices, model.tokenizer)
    if not quiet:
        print(result.line(), flush=True)
    return result


def one_weight(block: int, weight: str, **more: Any) -> Cell:
    """A cell that shares one matrix."""
    selector = f"block[{block}].{WEIGHTS[weight]}.weight"
    rows = [{"layers": "all", "share": False}, {"layers": selector, "share": True}]
    return Cell(f"{more.get('data', 'cola')} block {block} {weight}", rows, **more)


def share_only(selector: str) -> list[dict[str, Any]]:
    """Rows of a policy that shares what a selector names and nothing else."""
    return [{"layers": "all", "share": False}, {"layers": selector, "share": True}]


def controls(n: int, first: int) -> None:
    """Another text's message scored against a text, and messages that say nothing: none may be certain."""
    cell = one_weight(3, "query", n=n, first=first)
    made = messages(cell)
    attack, crossed, floor = panel.attack("span"), [], []
    for number, (model, seen, _, _) in enumerate(made):
        _, _, truth, indices = made[(number + 1) % len(made)]
        found = attack.reconstruct(seen, seed=0)
        crossed += leakage.judge(Outcome("span", found), truth, indices, model.tokenizer)
        guess = panel.attack("prior").reconstruct(seen, seed=0)
        floor += leakage.judge(Outcome("prior", guess), truth, indices, model.tokenizer)
    for name, scores in (("another text's message", crossed), ("the floor (prior)", floor)):
        print(f"{name:34s} R-1 {np.mean([s.metrics['rouge1'] for s in scores]):.3f}", flush=True)
    nothing(n, first)


def nothing(n: int, first: int) -> None:
    """Shuffled entries and pure noise, under several policies and attacks, with small budgets."""
    runs = sure = 0
    cells = [
        *(one_weight(block, weight, n=n, first=first) for block in (0, 3) for weight in WEIGHTS),
        Cell("embeddings withheld", WITHHELD, n=n, first=first, batch_size=2, threat=Threat(know=("count",))),
        Cell("everything", [], attack="rows", n=n, first=first),
    ]
    for cell in cells:
        for number, (_, seen, _, _) in enumerate(messages(cell), first):
            source = torch.Generator().manual_seed(number)
            for spoil in ("shuffled", "noise"):
                attack = panel.attack("span:quick" if cell.attack == "span" else cell.attack)
                false = replace(seen, message={k: _spoilt(v, spoil, source) for k, v in seen.message.items()})
                if attack.applicable(false):
                    continue
                sure += sum(attack.reconstruct(false, seed=number).certain)
                runs += 1
        print(f"  {cell.name:32s} so far: {runs} runs, certain {sure}", flush=True)


def _spoilt(value: torch.Tensor, how: str, source: torch.Generator) -> torch.Tensor:
    if how == "noise":
        return torch.randn(value.shape, generator=source) * value.std(correction=0)
    return value.flatten()[torch.randperm(value.numel(), generator=source)].reshape(value.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["single", "update", "lora", "wide", "last", "head", "controls", "partial"])
    parser.add_argument("--n", type=int, default=10, help="messages a cell")
    parser.add_argument("--first", type=int, default=0, help="messages left out before them, to go on with a row")
    parser.add_argument("--data", choices=["cola", "rotten_tomatoes"], default="cola")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=[w for w in WEIGHTS if w != "key"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32], help="of LoRA")
    parser.add_argument("--attack", default="span", help="on LoRA")
    given = parser.parse_args()
    torch.set_num_threads(1)
    unknown, which = Threat(know=()), {"n": given.n, "first": given.first}
    match given.what:
        case "single":
            for block in given.blocks:
                for weight in given.weights:
                    run(one_weight(block, weight, data=given.data, **which))
        case "update":
            for steps in (1, 4):
                threat = Threat(know=("count",), local_steps=steps, learning_rate=1e-3)
                run(Cell(f"{steps} local steps, batch 4", WITHHELD, batch_size=4, threat=threat, **which))
            run(Cell("mean of 2 clients, batch 2", WITHHELD, batch_size=2, threat=Threat(clients=2), **which))
        case "lora":
            for rank in given.ranks:
                for first in (True, False):
                    name = f"LoRA r = {rank}, {'first message' if first else 'B drawn'}"
                    run(
                        Cell(name, share_only("adapters"), attack=given.attack, lora=rank, first_message=first, **which)
                    )
        case "wide":
            run(Cell("Rotten Tomatoes, batch 16", WITHHELD, data="rotten_tomatoes", batch_size=16, threat=unknown,
                     **which))  # fmt: skip
        case "last" | "head":
            selector = "block[-1]" if given.what == "last" else "head"
            for attack in ("span", "match", "likelihood"):
                run(Cell(f"{selector} only, {attack}", share_only(selector), attack=attack, **which))
        case "controls":
            controls(given.n, given.first)
        case "partial":
            cell = one_weight(3, "query", **which)
            told = replace(cell, attack="match:partial", threat=Threat(know=("labels", "lengths")))
            ours, theirs = run(cell), run(replace(told, name="the same, match:partial"))
            print(f"median seconds, partial over span: {np.median(theirs.seconds) / np.median(ours.seconds):.0f}")


if __name__ == "__main__":
    main()
