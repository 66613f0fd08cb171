"""What a policy costs: train under it exactly as it would be deployed, score on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from dpguard.confusion import UTILITY_METRICS, classes_of, from_confusion
from dpguard.engine.gradients import per_example_losses
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.private_optimizer import PrivateOptimizer
from dpguard.errors import UserError, did_you_mean
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.randomness import devices_of, seeded
from dpguard.inputs.texts import Example
from dpguard.policy.table import Plan

OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}
PHYSICAL = 64
"""Examples in one backward pass; larger batches go in parts (memory of a part, the same sum)."""


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes:
        steps: messages released.
        sampling_rate: Poisson inclusion probability.
        clipped_fraction: share of (example, group) pairs that were scaled down, None without a clip.
        dropped: examples left out because their gradient was not finite.
        seconds: wall time.
    """

    steps: int
    sampling_rate: float
    clipped_fraction: float | None
    dropped: int
    seconds: float


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    plan: Plan,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    optimizer: str = "adam",
    seed: int = 0,
    physical: int = PHYSICAL,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train ``model`` in place with Poisson batches under a plan; dropout is on, as it would be.

    Args:
        model: the classifier; its parameters require gradients again afterwards.
        tokenizer: its tokenizer.
        examples: the N training texts.
        plan: the policy resolved against the model.
        epochs: expected passes; steps = round(epochs / sampling rate).
        batch_size: public batch size.
        learning_rate: of the optimizer.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        seed: of sampling, dropout and noise (a study's; a deployment has none).
        physical: examples in one backward pass.
        device: where model and batches are put; the model stays there. Noise is drawn on the CPU and copied.
        on_step: called with (steps done, steps in all).

    Raises:
        UserError: unknown optimizer, or a plan that trains nothing or withholds what it trains.
    """
    check_central(plan)
    started = time.perf_counter()
    model.to(device)
    model.train()
    inner = _optimizer(optimizer, model, plan, learning_rate)
    rows = _encode(examples, tokenizer)
    encoded = DataLoader(rows, batch_size=batch_size, collate_fn=_pad(tokenizer))  # type: ignore[arg-type,var-annotated]
    engine = PrivacyEngine()
    with seeded(seed, devices_of(model)):
        module, private, loader = engine.make_private(
            module=model, optimizer=inner, data_loader=encoded, policy=plan, seed=seed, loss_reduction="sum",
            max_physical_batch_size=physical, lengths=[len(ids) for ids, _ in rows],
        )  # fmt: skip
        steps = round(epochs / engine.sampling_rate)
        try:
            for part in _endless(loader, lambda: engine.steps < steps):
                _step(module, private, part.to(device))
                if private.stepped:
                    on_step(engine.steps, steps)
        finally:
            engine.close()
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None
    seconds = time.perf_counter() - started
    return Trained(
        engine.steps, engine.sampling_rate, engine.diagnostics.clipped_fraction, engine.diagnostics.dropped, seconds
    )


def check_central(plan: Plan) -> None:
    """Refuse a plan whose utility a central training cannot show.

    Raises:
        UserError: layers that are trained but withheld differ from client to client.
    """
    if plan.withheld:
        raise UserError(
            f"{len(plan.withheld)} withheld tensors are trained at each client, so one central model does not "
            "exist; it needs the federation"
        )
    if not plan.trained:
        raise UserError("the policy trains nothing; expected at least one trained layer")


def _step(module: nn.Module, private: PrivateOptimizer, part: Batch) -> None:
    private.zero_grad()
    private.empty = len(part) == 0
    if len(part):
        torch.autograd.backward(per_example_losses(module, part).sum())
    private.step()


def _optimizer(name: str, model: nn.Module, plan: Plan, learning_rate: float) -> Optimizer:
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}")
    trained = set(plan.trained)
    parameters = [p for n, p in model.named_parameters() if n in trained]
    # one pass over the weights instead of a dozen: a third of a step at batch 1
    return OPTIMIZERS[name](parameters, lr=learning_rate, fused=True)  # type: ignore[call-arg]


def _encode(examples: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], int]]:
    ids = tokenizer([e.text for e in examples])["input_ids"]
    return [(row, e.label) for row, e in zip(ids, examples, strict=True)]


def _pad(tokenizer: Any) -> Callable[[list[tuple[list[int], int]]], Batch]:
    padding = int(tokenizer.pad_token_id)

    def padded(items: list[tuple[list[int], int]]) -> Batch:
        longest = max(len(ids) for ids, _ in items)
        rows = torch.full((len(items), longest), padding, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for index, (ids, _) in enumerate(items):
            rows[index, : len(ids)] = torch.tensor(ids)
            mask[index, : len(ids)] = 1
        return Batch(rows, mask, torch.tensor([label for _, label in items]))

    return padded


def _endless(loader: DataLoader[Any], wanted: Callable[[], bool]) -> Iterator[Batch]:
    while True:
        for part in loader:
            yield part
            if not wanted():
                return


@torch.no_grad()
def predict(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 64
) -> tuple[list[int], float]:
    """Predicted classes and mean cross-entropy, dropout off, on the device where the model is.

    Returns:
        (predictions in the order of ``examples``, loss).
    """
    model.eval()
    device = next(model.parameters()).device
    predictions, losses = [], []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = collate([e.text for e in part], [e.label for e in part], tokenizer).to(device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        predictions += [int(c) for c in logits.argmax(1)]
        losses += nn.functional.cross_entropy(logits, batch.labels, reduction="none").tolist()
    return predictions, float(np.mean(losses))


def confusion(
    predictions: Sequence[int], labels: Sequence[int], classes: int = 2
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(classes, classes) counts, true class by predicted class; of ``classes``, or as many more as occur.

    >>> confusion([1, 0, 1], [1, 1, 1]).tolist()
    [[0.0, 0.0], [1.0, 2.0]]
    """
    classes = max(classes, 1 + max(*predictions, *labels))  # a head may have more than the task
    table = np.zeros((classes, classes))
    np.add.at(table, (np.asarray(labels), np.asarray(predictions)), 1)
    return table


def scores(
    predictions: Sequence[int], labels: Sequence[int], loss: float, classes: int | None = None
) -> dict[str, float]:
    """Every utility metric (`confusion.from_confusion` defines them), and the held-out loss.

    Args:
        predictions: classes guessed.
        labels: true classes of the same examples; of one client there may be a class alone.
        loss: their mean cross-entropy.
        classes: of the task, so that F1 means the same for every client and policy; None = those of the labels.
    """
    classes = classes or classes_of(labels)
    table = confusion(predictions, labels, classes)
    return {**{name: float(from_confusion(table, name, classes)) for name in UTILITY_METRICS}, "loss": loss}
