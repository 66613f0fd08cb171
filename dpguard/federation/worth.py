"""What a federation is worth: the global model, and every client's own model on its own held-out texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dpguard.confusion import classes_of
from dpguard.engine.local import LocalState
from dpguard.federation.personal import at_home
from dpguard.federation.split import Parts
from dpguard.inputs.texts import Example
from dpguard.measure import utility

WORST = 0.1
"""Share of the clients whose mean is the worst tenth."""


@dataclass(frozen=True)
class Worth:
    """Scores on held-out texts.

    Attributes:
        predictions: of each held-out text by the model that its owner uses: the global model with the owner's own
            layers in it; the global model's where nothing stays at home.
        loss: their mean cross-entropy.
        global_scores: metric -> of the global model on all held-out texts.
        mean, worst_tenth: metric -> over the clients' own models, each on its client's held-out texts. A client
            without any is left out.
        clients: how many clients that is.
    """

    predictions: list[int]
    loss: float
    global_scores: dict[str, float]
    mean: dict[str, float]
    worst_tenth: dict[str, float]
    clients: int


def judge(
    model: nn.Module,
    tokenizer: Any,
    test: Sequence[Example],
    parts: Parts,
    states: Sequence[LocalState],
    classes: int | None = None,
) -> Worth:
    """Score the last global weights, alone and with every client's own layers.

    Args:
        model: at the last global weights.
        tokenizer: its tokenizer.
        test: held-out texts.
        parts: whose they are.
        states: what stayed with each client.
        classes: of the task; None = those of the labels.
    """
    labels = [e.label for e in test]
    found, loss = utility.predict(model, tokenizer, test)
    classes = classes or classes_of(labels)
    global_scores = utility.scores(found, labels, loss, classes)
    predictions, total, each = list(found), 0.0, []
    for part, state in zip(parts, states, strict=True):
        if not part:
            continue
        with at_home(model, state.personal):
            own, own_loss = utility.predict(model, tokenizer, [test[i] for i in part])
        for index, prediction in zip(part, own, strict=True):
            predictions[index] = prediction
        total += own_loss * len(part)
        each.append(utility.scores(own, [labels[i] for i in part], own_loss, classes))
    mean = {name: sum(s[name] for s in each) / len(each) for name in global_scores}
    worst = {name: worst_mean([s[name] for s in each], high_is_bad=name == "loss") for name in global_scores}
    return Worth(predictions, total / len(test), global_scores, mean, worst, len(each))


def commonest(train: Sequence[Example], own: Parts, test: Sequence[Example], held_out: Parts) -> float:
    """Accuracy on the held-out texts when every client answers the commonest label of its own training texts.

    With clients that differ in their labels this needs no model, no message and no noise, and a layer of one's own
    may learn just that: an accuracy is worth what it has above this.

    Args:
        train: the clients' texts.
        own: whose they are; every client has one at least.
        test: held-out texts.
        held_out: whose they are.
    """
    right = 0
    for mine, asked in zip(own, held_out, strict=True):
        counts = Counter(train[i].label for i in mine)
        answer = min(counts, key=lambda label: (-counts[label], label))
        right += sum(test[i].label == answer for i in asked)
    return right / len(test)


def worst_mean(values: Sequence[float], *, high_is_bad: bool = False) -> float:
    """Mean over the worst tenth of the clients, one at least.

    >>> worst_mean([0.9, 0.5, 0.7])
    0.5
    """
    count = max(1, math.ceil(WORST * len(values) - 1e-9))
    return sum(sorted(values, reverse=high_is_bad)[:count]) / count
