"""What noise alone leaves of a table on the wire: the law of one entry, pruned and rounded, and of a row's energy.

A rounded entry is a multiple of a step that the message itself shows (its largest entry over the number of levels), so
its law is known, and where the step is coarse the energy of a row is a sum of whole numbers whose law is counted out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gamma, norm
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.policy.table import Rule

COARSE = 0.5
"""Step, in standard deviations of the noise, from which a row's energy is counted out level by level."""
REACH = 9.0
"""Standard deviations beyond which noise has no entry."""
LIGHT = 3.2
"""Kurtosis (3 for a Gaussian) up to which sums over a row of entries may be taken for Gaussian."""


@dataclass(frozen=True)
class Noise:
    """The law of an entry of noise as it arrives, in standard deviations of that noise.

    Attributes:
        second: mean of its square.
        fourth: mean of its fourth power.
        step: between two levels; 0 = not rounded.
        shares: (levels + 1,) probability that it has a size of 0, 1, 2 ... steps; None = not rounded.
        signs: whether it arrives as its sign, one level whatever its size.
    """

    second: float
    fourth: float
    step: float = 0.0
    shares: NDArray[np.float64] | None = None
    signs: bool = False

    @staticmethod
    def of(seen: Observation, name: str) -> Noise:
        """The law of the noise in a tensor of a message that has some."""
        rule = seen.disclosed.plan[name]
        sizes = seen.message[name].double().abs() / seen.noise_std(name)
        largest = float(sizes.max())
        if rule.bits is None or not largest:
            return Noise(*_pruned(sizes, rule))
        if seen.disclosed.clients > 1:  # each had a step of its own: measured, though the texts' entries are among them
            return Noise(float(sizes.pow(2).mean()), float(sizes.pow(4).mean()))
        step = largest / max(1, 2 ** (rule.bits - 1) - 1)
        shares = _shares(step, rule)
        squares = (step * np.arange(len(shares))) ** 2
        return Noise(float(shares @ squares), float(shares @ squares**2), step, shares, rule.bits == 1)

    @property
    def scale(self) -> float:
        """Size by which entries are divided so that they are no larger than standard Gaussian ones."""
        return math.sqrt(max(1.0, self.second))

    @property
    def light(self) -> bool:
        """Whether sums of entries over `scale` have no heavier tails than Gaussian ones."""
        return self.fourth <= LIGHT * self.scale**4

    def before(self, sizes: Tensor) -> Tensor:
        """The least that sizes, in standard deviations, can have been before they were rounded."""
        if self.shares is None:
            return sizes / self.scale
        return sizes - self.step * (1.0 if self.signs else 0.5)

    def loud(self, table: Tensor, alarms: float) -> Tensor:
        """(rows,) bool, rows whose energy noise alone exceeds in ``alarms`` rows of the whole table.

        Args:
            table: (rows, d) as it arrived, in standard deviations of the noise.
            alarms: expected number of rows.
        """
        found: Tensor = table.pow(2).sum(1) > self.loudest(table.shape[1], alarms / len(table))
        return found

    def loudest(self, width: int, chance: float) -> float:
        """Energy of a row of ``width`` entries that noise alone exceeds with this probability at most.

        Chi-squared, or the gamma law of the same mean and variance; counted out where the step is coarse.
        """
        if self.shares is not None and (self.signs or self.step >= COARSE):
            above = _energy(self.shares, width)[::-1].cumsum()[::-1]
            return (int((above[1:] > chance).sum()) + 0.5) * self.step**2
        mean, variance = width * self.second, width * (self.fourth - self.second**2)
        return float(gamma.isf(chance, mean**2 / variance, scale=variance / mean))


def _pruned(sizes: Tensor, rule: Rule) -> tuple[float, float]:
    """Second and fourth moment of entries that were pruned, by chance or below a size, or came whole."""
    kept = sizes[sizes != 0]
    if rule.keep == 1 or not kept.numel():
        return 1.0, 3.0
    if rule.prune != "magnitude":
        return rule.keep, 3 * rule.keep
    cut = float(kept.min())
    second = 2 * (cut * norm.pdf(cut) + norm.sf(cut))
    fourth = 2 * ((cut**3 + 3 * cut) * norm.pdf(cut) + 3 * norm.sf(cut))
    return float(second), float(fourth)


def _shares(step: float, rule: Rule) -> NDArray[np.float64]:
    """Probability of each size of a rounded entry, in steps from 0 on; one bit has one size, for all but zero."""
    bits = rule.bits or 1
    levels = np.arange(1, min(max(1, 2 ** (bits - 1) - 1), math.ceil(REACH / step)) + 1)
    magnitude = rule.keep < 1 and rule.prune == "magnitude"
    edges = np.maximum((levels - 0.5) * step if bits > 1 else 0.0 * levels, norm.isf(rule.keep / 2) if magnitude else 0)
    above = 2 * norm.sf(edges) * (1.0 if magnitude else rule.keep)
    shares = above - np.append(above[1:], 0.0)
    return np.concatenate([[1 - shares.sum()], shares])


def _energy(shares: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Probability of each sum of ``width`` squares, in squared steps from 0 on."""
    one = np.zeros((len(shares) - 1) ** 2 + 1)
    one[np.arange(len(shares)) ** 2] = shares
    size = (len(one) - 1) * width + 1
    law: NDArray[np.float64] = np.fft.irfft(np.fft.rfft(one, size) ** width, size)
    return law.clip(0)
