"""The public text whose gradient points most nearly where the message does: the simplest attack of all."""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.engine.gradients import gradient, running_as
from dpguard.inputs.batch import collate


class Nearest:
    """See the module's docstring."""

    name = "nearest"  # the file's name
    cite = "an example: nearest neighbour in gradient space"
    capability = Capability("any tensor", "propose a text that is not public", kinds=("gradient",), several=False)

    def __init__(self) -> None:
        self.presets = {"default": Budget(steps=0, candidates=200)}  # the first preset is the default

    def applicable(self, seen: Observation) -> str:
        """Empty, or the reason why this message says nothing to this attack: it goes on record as skipped."""
        return "" if seen.disclosed.public_texts else "no public texts to choose from"

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """The best of the first public texts, under the label that fits best when the label is not told."""
        told, limits = seen.disclosed, budget or self.presets[preset or "default"]
        classes = told.labels or range(seen.model.config.num_labels)
        best, closest = "", -2.0
        with running_as(seen.model, told.mode):
            for text in told.public_texts[: limits.candidates]:
                for label in classes:
                    batch = collate([text], [label], told.tokenizer)
                    found = _cosine(gradient(seen.model, batch, list(seen.message)), seen.message)
                    if found > closest:
                        best, closest = text, found
        tokens = list(told.tokenizer(best)["input_ids"])
        tried = min(limits.candidates, len(told.public_texts)) * len(classes)
        return Reconstruction([tokens], certain=[False], candidates=tried, notes={"cosine": closest})


def _cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Cosine over all tensors taken as one vector."""
    dot = sum(float((left[name] * right[name]).sum()) for name in right)
    size = [sum(float((side[name] ** 2).sum()) for name in right) ** 0.5 for side in (left, right)]
    return dot / (size[0] * size[1] + 1e-30)


PLUGIN = Nearest()
