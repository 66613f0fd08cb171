"""One example at a time by plain autograd: slow, and right for any model whose examples do not meet."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine import wire
from dpguard.engine.modes.base import NOTHING, GradientMode, trained_parameters
from dpguard.errors import UserError
from dpguard.policy.table import Plan


class Loop(GradientMode):
    """The model's forward pass runs row by row; each row's own graph is differentiated when the step collects.

    The loss must be a function of ``logits`` only. Dropout draws a mask a row, in the rows' order.

    Args:
        model: in train mode; its ``forward`` is wrapped until `detach`.
        plan: the policy.
        loss_reduction: ``mean`` or ``sum``.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.mean = loss_reduction == "mean"
        self.model = model
        self.parameters = trained_parameters(model, plan)
        self._rows: list[tuple[list[Tensor], Tensor]] = []
        original = model.forward

        @functools.wraps(original)
        def forward(**named: Any) -> Any:
            if not (model.training and torch.is_grad_enabled()):
                return original(**named)
            if self.pending():
                self.fold()
            self._rows.clear()
            named = {key: value for key, value in named.items() if key != "labels"}
            count = next(len(value) for value in named.values() if isinstance(value, Tensor))
            outputs = [original(**{key: _row(value, i, count) for key, value in named.items()}) for i in range(count)]
            leaf = torch.cat([output.logits for output in outputs]).detach().requires_grad_(True)
            self._rows.append(([output.logits for output in outputs], leaf))
            outputs[0].logits = leaf
            return outputs[0]

        model.forward = forward

    def part(self, before: wire.ClippedSum | None) -> wire.ClippedSum:
        """The clipped sum of the latest backward pass, added to ``before``.

        Raises:
            RuntimeError: a trained tensor took no part in the loss.
        """
        total = before
        names = list(self.parameters)
        for logits, leaf in self._rows:
            scale = float(len(logits)) if self.mean else 1.0
            if leaf.grad is None:
                continue
            for row, gradient in zip(logits, leaf.grad, strict=True):
                found = torch.autograd.grad(
                    row, list(self.parameters.values()), gradient[None] * scale, allow_unused=True
                )
                unused = [name for name, g in zip(names, found, strict=True) if g is None]
                if unused:
                    raise RuntimeError(
                        f"parameter {unused[0]!r} is trained but took no part in the loss; freeze it (train: false)"
                    )
                one = {name: g[None] for name, g in zip(names, found, strict=True) if g is not None}
                latest = wire.clip_and_sum(one, self.plan)
                total = latest if total is None else total.plus(latest)
        if total is None:
            raise UserError(NOTHING)
        return total

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        return any(leaf.grad is not None for _, leaf in self._rows)

    def clear(self) -> None:
        """Drop what the latest backward pass left."""
        self._rows.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def detach(self) -> None:
        """See `GradientMode.detach`."""
        self.model.__dict__.pop("forward", None)


def _row(value: Any, index: int, count: int) -> Any:
    return value[index : index + 1] if isinstance(value, Tensor) and len(value) == count else value
