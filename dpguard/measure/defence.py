"""Does the defence do what its table says? Measured on the tensors just after noise, in every cell."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.stats import chi2
from torch import Tensor

from dpguard.engine.client import Client
from dpguard.inputs.batch import Batch

ALPHA = 1e-9
"""Chance of a false alarm a tensor: a study has thousands of them."""


class DefenceError(RuntimeError):
    """The emitted tensors do not obey the table: a bug, and the cell fails with it."""


@dataclass(frozen=True)
class Effect:
    """What was measured.

    Attributes:
        clip: clip group -> (norm of one example's contribution, bound C).
        noise: part of the model -> (measured std, claimed std) of the sum's noise.
    """

    clip: dict[str, tuple[float, float]]
    noise: dict[str, tuple[float, float]]


def check(client: Client, batch: Batch, *, seed: int = 0) -> Effect:
    """Measure clip and noise on a client's own messages.

    Noise: the difference of two messages of one batch. Clip: the difference of the messages with and
    without the last example at the same noise. Wire: exactly the plan's shared tensors.

    Raises:
        DefenceError: something leaves that should not, a norm above its bound, or noise of another size.
    """
    client = replace(client, batch_size=client.batch_size or max(1, len(batch)))  # one divisor for all three
    first = client.message(batch, torch.Generator().manual_seed(seed))
    again = client.message(batch, torch.Generator().manual_seed(seed + 1))
    fewer = client.message(batch.rows(slice(0, len(batch) - 1)), torch.Generator().manual_seed(seed))
    if set(first.wire) != set(client.plan.shared):
        raise DefenceError(f"on the wire: {sorted(set(first.wire) ^ set(client.plan.shared))} against the plan")
    return Effect(clip=_clip(client, first.noised, fewer.noised), noise=_noise(client, first.noised, again.noised))


def _clip(client: Client, full: dict[str, Tensor], fewer: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    out = {}
    for key, group in client.plan.groups.items():
        moved = math.sqrt(sum(float((full[n].double() - fewer[n].double()).pow(2).sum()) for n in group.names))
        # both messages were rounded to the tensor's own precision when the noise was added
        rounding = 2**-22 * math.sqrt(sum(float(full[n].double().pow(2).sum()) for n in group.names))
        # a whole update that changes may turn from C to -C, on the scale of the sum
        bound = group.clip if group.unit == "example" else 2 * group.clip * (client.batch_size or 1)
        if moved > bound * (1 + 1e-5) + rounding:
            raise DefenceError(f"one example moved clip group {key!r} by {moved:.6g}, above its bound {bound:g}")
        out[key] = (moved, bound)
    return out


def _noise(client: Client, first: dict[str, Tensor], again: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    squares: dict[tuple[str, float], list[float]] = {}
    for name in client.plan.trained:
        rule = client.plan[name]
        claimed = rule.std(client.batch_size or 1)
        difference = (first[name].double() - again[name].double()) / math.sqrt(2)
        if claimed == 0:
            if bool(difference.any()):
                raise DefenceError(f"{name!r} is noised against the plan")
            continue
        squared, count = float(difference.pow(2).sum()) / claimed**2, difference.numel()
        low, high = chi2.ppf(ALPHA, count), chi2.isf(ALPHA, count)
        if not low <= squared <= high:
            measured = claimed * math.sqrt(squared / count)
            raise DefenceError(f"noise on {name!r} has std {measured:.4g}, the table claims {claimed:.4g}")
        total = squares.setdefault((rule.slot.part, claimed), [0.0, 0.0])
        total[0] += squared
        total[1] += count
    return {
        part if sum(p == part for p, _ in squares) == 1 else f"{part} at {claimed:g}": (
            claimed * math.sqrt(squared / count),
            claimed,
        )
        for (part, claimed), (squared, count) in squares.items()
    }
