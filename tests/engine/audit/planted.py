"""Mechanisms with one planted bug each, and a correct one written apart from the engine's.

`Noisy` is a second implementation of clip, sum, noise, release; a bug overrides one of its steps.
"""

from __future__ import annotations

import math

import torch

from dpguard.engine import wire
from dpguard.engine.audit.subject import MASK_SEED

LAYER = "bert.encoder.layer.0.attention.self.query.weight"
BIAS = "bert.encoder.layer.0.attention.self.query.bias"
OTHER = "bert.encoder.layer.0.attention.self.key.weight"


class Noisy:
    def __init__(self, plan, batch_size):
        self.plan, self.batch_size = plan, batch_size

    def __call__(self, per_example, seed):
        self.per_example, self.seed = per_example, seed
        self.rows = min((g.shape[0] for g in per_example.values()), default=0)
        self.generator = torch.Generator().manual_seed(seed)
        sums = self.sums({n: per_example[n].double() for n in self.plan.trained})
        noised = self.finish({n: self.noised(n, s) for n, s in sums.items()}, sums)
        return wire.Message(noised, self.sent(noised, sums))

    def finite(self, grads):
        flags = torch.ones(self.rows, dtype=torch.bool)
        for g in grads.values():
            flags &= g.flatten(1).isfinite().all(1)
        return flags

    def sums(self, grads):
        keep = self.finite(grads)
        grads = {n: g[keep] for n, g in grads.items()}
        squares = {n: g.flatten(1).square().sum(1) for n, g in grads.items()}
        self.norms = {key: sum(squares[n] for n in group.names).sqrt() for key, group in self.plan.groups.items()}
        return {n: torch.einsum("b,b...->...", self.factor(n, grads), g) for n, g in grads.items()}

    def factor(self, name, grads):
        rule = self.plan[name]
        if rule.clip is None:
            return torch.ones(len(grads[name]), dtype=torch.float64)
        return (rule.clip / self.norms[rule.group].clamp(min=1e-300)).clamp(max=1.0)

    def std(self, name):
        return self.plan[name].std(self.batch_size)

    def draw(self, name, total):
        return torch.randn(total.shape, generator=self.generator, dtype=torch.float64)

    def noised(self, name, total):
        return total + self.std(name) * self.draw(name, total)

    def finish(self, noised, sums):
        return noised

    def divisor(self):
        return self.batch_size

    def sent(self, noised, sums):
        return wire.release(noised, self.plan, batch_size=self.divisor(), mask_seed=MASK_SEED)


def top(tensor, fraction=0.25):
    count = max(1, int(fraction * tensor.numel()))
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[tensor.abs().flatten().topk(count).indices] = 1.0
    return mask.reshape(tensor.shape)


class NoClipOnOneLayer(Noisy):
    def factor(self, name, grads):
        found = super().factor(name, grads)
        return torch.ones_like(found) if name == LAYER else found


class NoClip(Noisy):
    def factor(self, name, grads):
        return torch.ones(len(grads[name]), dtype=torch.float64)


class OverNormalised(Noisy):
    """Scales every example up or down to the clip, and tiny ones past it."""

    def factor(self, name, grads):
        rule = self.plan[name]
        return rule.clip * (1 + 1e-4) / self.norms[rule.group].clamp(min=1e-300)


class BatchClip(Noisy):
    def sums(self, grads):
        keep = self.finite(grads)
        plain = {n: g[keep].sum(0) for n, g in grads.items()}
        for group in self.plan.groups.values():
            norm = math.sqrt(sum(float(plain[n].square().sum()) for n in group.names))
            for n in group.names:
                plain[n] = plain[n] * min(1.0, group.clip * max(1, self.rows) / max(norm, 1e-300))
        return plain


class TopKOfTheSum(Noisy):
    def sums(self, grads):
        return {n: s * top(s) for n, s in super().sums(grads).items()}


class LeakedMask(Noisy):
    def finish(self, noised, sums):
        return {n: value * top(sums[n]) for n, value in noised.items()}


class LeakedMaskOnTheWire(Noisy):
    def sent(self, noised, sums):
        return {n: value * top(sums[n]) for n, value in super().sent(noised, sums).items()}


class UnnoisedZeros(Noisy):
    def noised(self, name, total):
        return total + self.std(name) * self.draw(name, total) * (total != 0)


class ActualDivisor(Noisy):
    def divisor(self):
        return max(1, self.rows)


class DataScaledNoise(Noisy):
    def noised(self, name, total):
        norms = self.per_example[name].flatten(1).norm(dim=1).nan_to_num()
        scale = min(1.0, float(norms.mean()) / self.plan[name].clip * 20) if self.rows else 1.0
        return total + scale * self.std(name) * self.draw(name, total)


class QuantisedBeforeNoise(Noisy):
    def sums(self, grads):
        out = super().sums(grads)
        for n, s in out.items():
            step = self.plan[n].clip / 8
            out[n] = torch.round(s / step) * step
        return out


class NaNPassThrough(Noisy):
    def finite(self, grads):
        return torch.ones(self.rows, dtype=torch.bool)


class SigmaWrong(Noisy):
    wrong: dict[str, float] = {}  # noqa: RUF012
    everywhere = 1.0

    def std(self, name):
        return super().std(name) * self.wrong.get(name, self.everywhere)


class NinetyPerCent(SigmaWrong):
    everywhere = 0.9


class NinetyPerCentInABias(SigmaWrong):
    wrong = {BIAS: 0.9}  # noqa: RUF012


class TenPerCentMore(SigmaWrong):
    wrong = {LAYER: 1.1}  # noqa: RUF012


class FivePerCentInOneGroup(SigmaWrong):
    def std(self, name):
        return super().std(name) * (0.95 if self.plan[name].slot.role == "head" else 1.0)


class SameSeedForTwoLayers(Noisy):
    def draw(self, name, total):
        if name in (LAYER, OTHER):
            generator = torch.Generator().manual_seed(self.seed + 1)
            return torch.randn(total.shape, generator=generator, dtype=torch.float64)
        return super().draw(name, total)


class UniformNoise(Noisy):
    def draw(self, name, total):
        return (torch.rand(total.shape, generator=self.generator, dtype=torch.float64) - 0.5) * math.sqrt(12)


class TiledNoise(Noisy):
    """Sixteen values, over and over."""

    def draw(self, name, total):
        few = torch.randn(16, generator=self.generator, dtype=torch.float64)
        return few.repeat(-(-total.numel() // 16))[: total.numel()].reshape(total.shape)


class NoiseWhereNoneIsClaimed(Noisy):
    def std(self, name):
        return max(super().std(name), 1e-3)


class SameNoiseEveryRound(Noisy):
    def __call__(self, per_example, seed):
        return super().__call__(per_example, seed // 2)


class WithheldIsShared(Noisy):
    def sent(self, noised, sums):
        return super().sent(noised, sums) | {n: noised[n] / self.batch_size for n in self.plan.withheld}


class StaleState(Noisy):
    """Error feedback: what clipping cut off is added next time."""

    def __init__(self, plan, batch_size):
        super().__init__(plan, batch_size)
        self.left = {}

    def sums(self, grads):
        keep = self.finite(grads)
        out = super().sums(grads)
        for n, s in out.items():
            before = self.left.get(n, torch.zeros_like(s))
            self.left[n] = before + 0.1 * (grads[n][keep].sum(0) - s)
            out[n] = s + before
        return out


class OldSum(Noisy):
    """An accumulator that nobody clears: half of the last clean sum is still in it."""

    last: dict[str, torch.Tensor] | None = None

    def sums(self, grads):
        out = super().sums(grads)
        last, self.last = self.last, out
        return out if last is None else {n: s + 0.5 * last[n] for n, s in out.items()}


class NoEmptyBatch(Noisy):
    def sums(self, grads):
        if not self.rows:
            raise ZeroDivisionError("a mean over nothing")
        return super().sums(grads)


class SilentOnEmpty(Noisy):
    """An empty Poisson batch that says so: nothing was sent, so nothing was noised."""

    def std(self, name):
        return super().std(name) if self.rows else 0.0


class OtherPrivateMask(Noisy):
    def sent(self, noised, sums):
        return wire.release(noised, self.plan, batch_size=self.batch_size, mask_seed=self.seed)


BUGS = {
    NoClipOnOneLayer: "S",
    BatchClip: "S",
    TopKOfTheSum: "S",
    LeakedMask: "N",
    LeakedMaskOnTheWire: "W",
    UnnoisedZeros: "N",
    ActualDivisor: "P",
    DataScaledNoise: "E",
    QuantisedBeforeNoise: "S",
    NaNPassThrough: "S",
    NinetyPerCent: "N",
    NinetyPerCentInABias: "N",
    TenPerCentMore: "N",
    FivePerCentInOneGroup: "N",
    SameSeedForTwoLayers: "N",
    UniformNoise: "N",
    SameNoiseEveryRound: "N",
    TiledNoise: "N",
    WithheldIsShared: "W",
    StaleState: "S",
    OldSum: "S",
    NoEmptyBatch: "E",
    SilentOnEmpty: "E",
}
"""Bug -> letter of the check that must catch it."""

ALONE = {
    LeakedMaskOnTheWire, NinetyPerCentInABias, TenPerCentMore, UniformNoise, SameSeedForTwoLayers, WithheldIsShared
}  # fmt: skip
"""Bugs that no other check than their own may complain about (claims, which read the noise, apart)."""
