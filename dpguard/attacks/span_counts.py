"""How often each text of a batch is in it: identical texts have one span, and the gradient's size tells them apart.

A text's gradient is linear in what its loss tells the logits, m p - n for a text that is m times in the batch
with n_y labels of class y (p: the model's probabilities). So least squares over the texts found gives these few
numbers, and small whole numbers explain them in one way or not at all. That the fit leaves nothing of the message
shows that no text is missing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import comb

import torch
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.attacks.span_rank import resolution_of
from dpguard.engine.gradients import forward_arguments
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import predicts_tokens

MOST = 8
"""Copies of one text that are looked for."""
WAYS = 5000
"""Ways to label the copies that are tried."""
UNEXPLAINED = 1e-3
"""Share of the message's norm that an exact fit may leave, besides what rounding did."""
LARGEST = 1 << 27
"""Entries (of 8 bytes) of the gradients that are held side by side; beyond, copies are not counted."""
WHOLE = 3e-4
"""Distance from what whole numbers would give (measured: 2e-7 to 3e-6, in bfloat16 3e-5)."""


def counts_of(seen: Observation, name: str, texts: Sequence[list[int]]) -> list[int] | None:
    """How often each text is in the batch, or None when these texts do not explain the message in one way.

    Args:
        seen: a gradient that is not clipped by example.
        name: the tensor that is explained, the weight of a linear layer.
        texts: token ids, no text twice.
    """
    told = seen.disclosed
    message = seen.message[name].detach().double().flatten()
    if not texts or name not in told.plan or told.plan[name].clip is not None or told.kind != "gradient":
        return None
    if predicts_tokens(seen.model) or seen.model.config.num_labels < 2:  # type: ignore[union-attr,operator]
        return None
    classes = int(seen.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    if message.numel() * len(texts) * (classes - 1) > LARGEST:
        return None
    columns, chances = zip(*(_columns(seen, name, ids) for ids in texts), strict=True)
    matrix = torch.cat(columns, dim=1)
    target = message * told.batch_size * told.clients
    gram = matrix.T @ matrix
    fitted = torch.linalg.lstsq(gram, matrix.T @ target).solution
    missing = float((target - matrix @ fitted).norm() / target.norm())
    if not missing <= UNEXPLAINED + resolution_of(message):
        return None
    counts = [
        _whole(chance, part) for chance, part in zip(chances, fitted.split([c.shape[1] for c in columns]), strict=True)
    ]
    return None if None in counts else [count for count in counts if count is not None]


def _columns(seen: Observation, name: str, ids: list[int]) -> tuple[Tensor, Tensor]:
    """(n, C - 1) gradients of one text for a push on each logit but the last, and (C,) the model's probabilities.

    A push on the last one is the negative sum of the others: what a loss tells the logits sums to zero.
    """
    model = seen.model
    weight = model.get_parameter(name)
    text = torch.tensor(ids, device=weight.device)[None]
    batch = Batch(text, torch.ones_like(text), torch.zeros(1, dtype=torch.int64, device=weight.device))
    wanted = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(**forward_arguments(model, batch)).logits
            pushes = [logits[0, c] - logits[0, -1] for c in range(logits.shape[1] - 1)]
            parts = [torch.autograd.grad(push, weight, retain_graph=True)[0] for push in pushes]
    finally:
        weight.requires_grad_(wanted)
    return torch.stack([p.double().flatten() for p in parts], dim=1), logits.detach().double().softmax(1)[0]


def _whole(chance: Tensor, push: Tensor) -> int | None:
    """The one number of copies that gives (C - 1,) pushes at (C,) probabilities, or None."""
    classes, found = len(chance), []
    for copies in range(1, MOST + 1):
        if comb(copies + classes - 1, copies) > WAYS:
            break
        for labels in combinations_with_replacement(range(classes), copies):
            told = torch.bincount(torch.tensor(labels), minlength=classes).to(chance)
            if float((copies * chance - told)[:-1].sub(push).abs().max()) < WHOLE:
                found.append(copies)
    return found[0] if len(found) == 1 else None
