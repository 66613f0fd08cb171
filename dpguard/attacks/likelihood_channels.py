"""What of a message a Gaussian likelihood can read, tensor by tensor: value, variance, surviving entries.

The client sends m = (clipped gradient + noise) / batch size, then prunes and quantises. In units of the sum:

    noise only         each entry has the noise's variance: exact
    pruned             the same on the entries that arrived (which entries they are is not used as evidence)
    2 bits and more    the rounding adds step² / 12 (uniform, independent of the gradient): an approximation
    1 bit              signs times a scale: the gradient up to an unknown gain (Bussgang), profiled out
    no noise           variance 0 would make every candidate but the truth impossible, so such a tensor counts as if
                       it had come with a relative error of `CLEAN` in all: the likelihood degenerates to the sum of
                       relative squared distances, in which every clean tensor weighs the same
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dpguard.attacks.observation import Observation

CLEAN = 0.01
"""Relative error that a tensor without noise counts with."""
NEGLIGIBLE = 1e-6
"""A tensor without noise this much smaller than the largest holds rounding errors (a key's bias) and is left out."""


@dataclass(frozen=True)
class Channel:
    """One tensor of the message.

    Attributes:
        name: the parameter.
        value: what arrived, float32, in units of the sum over the batch.
        variance: of each entry around the candidate's clipped gradient.
        kept: entries that arrived, None for all.
        gain: False when the gradient is only known up to a positive factor (1 bit).
        clean: neither noise nor rounding stands between the gradient and the value.
    """

    name: str
    value: Tensor
    variance: float
    kept: Tensor | None
    gain: bool
    clean: bool


def channels(seen: Observation) -> tuple[list[Channel], list[str]]:
    """The tensors that can be compared, and the names of those that can't (unknown release operations)."""
    sums = {name: value.detach().float() * seen.disclosed.batch_size for name, value in seen.message.items()}
    largest = max((float(value.norm()) for value in sums.values()), default=0.0)
    out, ignored = [], []
    for name, value in sums.items():
        channel = None if name not in seen.disclosed.plan else _channel(seen, name, value, NEGLIGIBLE * largest)
        if channel is None:
            ignored.append(name)
        else:
            out.append(channel)
    return out, ignored


def _channel(seen: Observation, name: str, value: Tensor, least: float) -> Channel | None:
    rule = seen.disclosed.plan[name]
    if rule.release:
        return None
    noise, norm = rule.std(seen.disclosed.batch_size) ** 2, float(value.norm())
    kept = (value != 0).to(value.dtype) if rule.keep < 1 else None
    if rule.bits == 1:
        entries = float((value != 0).sum())
        # the part of a sign that no linear function of a Gaussian explains
        spread = (1 - 2 / math.pi) * norm**2 / max(entries, 1.0)
        return Channel(name, value, spread, kept, gain=False, clean=False) if spread else None
    if rule.bits is not None:
        step = float(value.abs().max()) / (2 ** (rule.bits - 1) - 1) if value.numel() else 0.0
        noise += step**2 / 12
    if noise:
        return Channel(name, value, noise, kept, gain=True, clean=False)
    if norm <= least:
        return None
    return Channel(name, value, (CLEAN * norm) ** 2, kept, gain=True, clean=True)
