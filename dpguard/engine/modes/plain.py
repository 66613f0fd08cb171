"""The ordinary gradient, for plans that clip no example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpguard.engine import noise, wire
from dpguard.engine.modes.base import GradientMode, trained_parameters
from dpguard.policy.table import Plan


class PlainSum(GradientMode):
    """For plans without any clip: the ordinary gradient, scaled back to a sum; costs what training costs.

    A step whose sum is not finite is left out whole, because no single example can be told apart.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.parameters = trained_parameters(model, plan)
        self.mean = loss_reduction == "mean"
        self.rows = 0
        self.handles = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._count)]

    def _begin(self, _module: nn.Module, _arguments: object) -> None:
        if self.rows == 0:  # what an optimizer left in .grad is no gradient of this step
            self.clear()

    def _count(self, _module: nn.Module, _arguments: object, output: object) -> None:
        if torch.is_grad_enabled():
            self.rows = int(getattr(output, "logits", torch.zeros(1)).shape[0])

    def part(self, before: wire.ClippedSum | None) -> wire.ClippedSum:
        """The sum of the latest backward pass, added to ``before``; the gradients themselves become it."""
        scale = float(self.rows) if self.mean else 1.0
        sums = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).to(noise.wide(p.dtype))
            for name, p in self.parameters.items()
        }
        dropped = 0 if all(_finite(g) for g in sums.values()) else self.rows
        for value in sums.values():
            if dropped:
                value.zero_()
            elif scale != 1:
                value.mul_(scale)
        latest = wire.ClippedSum(sums, {}, dropped, self.rows)
        return latest if before is None else before.plus(latest)

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        return self.rows > 0 and any(p.grad is not None for p in self.parameters.values())

    def clear(self) -> None:
        """Drop the gradient."""
        self.rows = 0
        for parameter in self.parameters.values():
            parameter.grad = None

    def detach(self) -> None:
        """See `GradientMode.detach`."""
        for handle in self.handles:
            handle.remove()


def _finite(value: Tensor) -> bool:
    """Whether every entry is; a finite sum, the usual case, says so without a second tensor."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
