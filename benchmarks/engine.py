"""What privacy costs a training step: seconds and memory of every way, beside the non-private step of the same run.

    python benchmarks/engine.py [--model minilm] [--batch-size 16] [--length 32] [--repeats 15]
        [--device cpu] [--dtype float32] [--quick] [--large]

One thread, random token ids, SGD, medians of interleaved repeats (machines are shared; only ratios mean something).
A step is: zero_grad, forward, backward, clip, noise on every trained entry (a cryptographic source, as deployed) and
the optimizer's step. Peak memory is what the step allocates above the model, from PyTorch's allocator records.
``--large`` adds a logical batch of 2,048 in parts of 32.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.private_optimizer import PrivateOptimizer
from dpguard.engine.sampling import Part
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy

Step = Callable[[], None]
FROZEN = {"layers": "embeddings", "train": False}
ALL = [{"layers": "all", "clip": 1.0, "noise": 0.8}]
BLOCKS = [{"layers": "all", "clip": 1.0, "noise": 0.8, "per": "block"}]
LAST = [{"layers": "all", "train": False}, {"layers": "block[-1]", "train": True, "clip": 1.0, "noise": 0.8}]


class Bench:
    """Makes one step function a variant, each on its own copy of the model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)

    def model(self) -> nn.Module:
        if self.options.model == "base":
            from transformers import BertConfig, BertForSequenceClassification

            module: nn.Module = BertForSequenceClassification(BertConfig(num_labels=2))
        else:
            module = models.load(self.options.model, labels=2, seed=0).module
        return module.train().to(self.device, self.dtype)

    def batch(self, module: nn.Module, rows: int | None = None) -> dict[str, Tensor]:
        rows = rows or self.options.batch_size
        generator = torch.Generator().manual_seed(0)
        shape = (rows, self.options.length)
        ids = torch.randint(1, module.config.vocab_size, shape, generator=generator)  # type: ignore[union-attr,arg-type]
        positions = torch.arange(shape[1]).repeat(rows, 1)
        fields = {
            "input_ids": ids,
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "position_ids": positions,
            "labels": ids[:, 0] % 2,
        }
        return {key: value.to(self.device) for key, value in fields.items()}

    def training_step(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        batch = self.batch(module)

        whole = Part(first=True, last=True, rows=len(batch["labels"]), epoch=1)

        def step() -> None:
            optimizer.zero_grad()
            if isinstance(optimizer, PrivateOptimizer):
                optimizer.begin_part(whole)  # as the private loader says of the batches that it hands out
            module(**batch).loss.backward()
            optimizer.step()

        return step

    def plain(self, rows: list[dict[str, Any]]) -> Step:
        module = self.model()
        plan = Policy(rows).plan(slots(module))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in plan.trained)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)
        return self.training_step(module, optimizer)

    def private(self, rows: list[dict[str, Any]], grad_mode: str, **more: Any) -> Step:
        module = self.model()
        size = self.options.batch_size
        engine = PrivacyEngine()
        loader: DataLoader[int] = DataLoader(range(size * 100), batch_size=size)  # type: ignore[arg-type]
        module, optimizer, _ = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-4), data_loader=loader,
            policy=Policy(rows), grad_mode=grad_mode, **more,
        )  # fmt: skip
        return self.training_step(module, optimizer)

    def ghost(self, rows: list[dict[str, Any]]) -> Step:
        """Opacus's own ghost clipping (flat clip only)."""
        from opacus import PrivacyEngine as Opacus

        module = self.model()
        plan = Policy(rows).plan(slots(module))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in plan.trained)
        size = self.options.batch_size
        data: DataLoader[int] = DataLoader(range(size * 100), batch_size=size)  # type: ignore[arg-type]
        private, optimizer, criterion, _ = Opacus().make_private(
            module=module, optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4),
            criterion=nn.CrossEntropyLoss(), data_loader=data, noise_multiplier=0.8, max_grad_norm=1.0,
            grad_sample_mode="ghost", poisson_sampling=False,
        )  # fmt: skip
        batch = self.batch(module)
        labels = batch.pop("labels")

        def step() -> None:
            optimizer.zero_grad()
            criterion(private(**batch).logits, labels).backward()
            optimizer.step()

        return step


def peak(step: Step, device: torch.device) -> float:
    """Bytes that one step holds at most above what it found."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = highest = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return float(highest)


def measure(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds a step, the variants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def variants(bench: Bench, quick: bool) -> dict[str, Step]:
    frozen = [*BLOCKS, FROZEN]
    out = {
        "non-private, all": bench.plain([{"layers": "all", "train": True}]),
        "non-private, embeddings frozen": bench.plain([FROZEN]),
        "fast, all, flat": bench.private(ALL, "fast"),
        "fast, all, per block": bench.private(BLOCKS, "fast"),
        "fast, embeddings frozen, per block": bench.private(frozen, "fast"),
        "fast, last block only": bench.private(LAST, "fast"),
    }
    if not quick:
        out["Opacus ghost, all, flat"] = bench.ghost([{"layers": "all", "train": True}])
        out["Opacus hooks, all, flat"] = bench.private(ALL, "opacus")
        out["one-example loop, all, flat"] = bench.private(ALL, "loop")
    return out


def large(bench: Bench) -> str:
    """A logical batch in parts of 32 against one part: memory, and the same sum."""
    from dpguard.engine import clipping

    module = bench.model()
    plan = Policy(ALL).plan(slots(module))
    mode = clipping.attach(module, plan)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    batch = bench.batch(module, 2048)
    parts = [{key: value[i : i + 32] for key, value in batch.items()} for i in range(0, 2048, 32)]

    def run(chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        for chunk in chunks:
            module(**chunk).loss.backward()
            mode.fold()
        return mode.collect().sums

    one, all_parts = (peak(lambda c=c: run(c), bench.device) / 1e6 for c in (parts[:1], parts[:8]))  # type: ignore[misc]
    in_parts = run(parts)
    whole = run([{key: value[i : i + 512] for key, value in batch.items()} for i in range(0, 2048, 512)])
    error = max(float((in_parts[n] - whole[n]).norm() / whole[n].norm().clamp(min=1e-12)) for n in whole)
    return f"logical 2048 in parts of 32: {all_parts:.0f} MB (one part {one:.0f} MB); against parts of 512: {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm", help="a model of dpguard's, or 'base': BERT-base's shape")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="leave out the slow variants")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    bench = Bench(options)
    steps = variants(bench, options.quick)
    memory = {name: peak(step, bench.device) / 1e6 for name, step in steps.items()}
    seconds = measure(steps, options.repeats, bench.device)
    table = Table(title=f"{options.model}, B={options.batch_size}, L={options.length}, {options.dtype}")
    for column in ("variant", "ms a step", "x non-private", "peak MB", "x non-private"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name in steps:
        base = "non-private, embeddings frozen" if "frozen" in name else "non-private, all"
        table.add_row(
            name, f"{1000 * seconds[name]:.0f}", f"{seconds[name] / seconds[base]:.2f}",
            f"{memory[name]:.0f}", f"{memory[name] / memory[base]:.2f}",
        )  # fmt: skip
    Console().print(table)
    if not options.quick:
        for other in ("Opacus ghost, all, flat", "Opacus hooks, all, flat"):
            print(f"fast / {other}: {seconds['fast, all, flat'] / seconds[other]:.2f}")
    if options.large:
        print(large(bench))


if __name__ == "__main__":
    main()
