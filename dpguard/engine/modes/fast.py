"""Per-group clipping in one backward pass: book-keeping (Bu et al., ICML 2023, arXiv 2210.00038).

The backward pass computes activation gradients only; every layer's input and output gradient are kept, give the
norms (Gram trick), and then the clipped sum in one product a tensor. Groups of any shape cost the same (group-wise
clipping: He et al., ICLR 2023, arXiv 2212.01539). Exact: nothing is estimated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine import noise, wire
from dpguard.engine.modes import layers
from dpguard.engine.modes.base import NOTHING, GradientMode, trained_parameters
from dpguard.engine.modes.contributions import Contribution, Grams, merge, squared_norm
from dpguard.errors import UserError
from dpguard.policy.table import Plan


@dataclass(frozen=True)
class _Use:
    """One use of a layer that went backward."""

    layer: nn.Module
    input: Tensor
    version: int
    gradient: Tensor


class Fast(GradientMode):
    """Book-keeping on the layers that it knows, Opacus's samplers on the others (said once, in a warning).

    While the model runs forward in train mode its trained tensors do not require a gradient, so autograd never
    forms their ordinary gradients; what is frozen below the lowest trained layer is not differentiated at all.

    Args:
        model: in train mode.
        plan: the policy.
        loss_reduction: ``mean`` or ``sum``, as the loss of the backward pass is reduced over the batch.

    Raises:
        UserError: a trained layer that neither a rule nor a sampler can handle.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.mean = loss_reduction == "mean"
        self.parameters = trained_parameters(model, plan)
        self._uses: list[_Use] = []
        self._rules: dict[nn.Module, layers.Rule] = {}
        self._own = _owners(model, self.parameters)
        unknown = []
        for path, layer in model.named_modules():
            if layer in self._own:
                rule = layers.rule_of(layer)
                if rule is None:
                    rule = layers.fallback(layer, path)
                    unknown.append(f"{path} ({type(layer).__name__})")
                self._rules[layer] = rule
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            listed = ", ".join(unknown[:3]) + more
            warnings.warn(f"per-example gradients by Opacus's samplers for {listed}", stacklevel=3)
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
            *(layer.register_forward_hook(self._forward, with_kwargs=True) for layer in self._own),
        ]

    def _begin(self, model: nn.Module, _arguments: Any) -> None:
        if model.training and torch.is_grad_enabled():
            if self._uses:  # the next part of a logical batch
                self.fold()
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    def _end(self, _model: nn.Module, _arguments: Any, _output: Any) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _forward(self, layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        if not isinstance(output, Tensor):
            raise UserError(
                f"{type(layer).__name__} has trained tensors and gives {type(output).__name__}, no tensor; expected it "
                "frozen (train: false), or grad_mode='loop'"
            )
        if not output.requires_grad:  # the lowest trained layer: the backward pass ends here
            output.requires_grad_(True)
        given: Tensor = arguments[0] if arguments else next(iter(named.values()))
        output.register_hook(partial(self._backward, layer, given.detach(), given._version))  # type: ignore[no-untyped-call]

    def _backward(self, layer: nn.Module, given: Tensor, version: int, gradient: Tensor) -> None:
        self._uses.append(_Use(layer, given, version, gradient.detach()))

    def part(self, before: wire.ClippedSum | None) -> wire.ClippedSum:
        """The clipped sum of the latest backward pass, added to ``before`` in place.

        Raises:
            UserError: nothing went backward.
            RuntimeError: a trained tensor took no part in the loss; an input that is not per example (a
                broadcast row, Opacus issue #841); an input that was overwritten in place after its layer ran.
        """
        if not self._uses:
            raise UserError(NOTHING)
        with torch.no_grad():
            merged = {name: merge(uses) for name, uses in self._contributions().items()}
            self._uses.clear()
            rows = self._batch(merged)
            scale = float(rows) if self.mean else 1.0
            grams = Grams()
            shapes = {name: p.shape for name, p in self.parameters.items()}
            squared = {name: squared_norm(uses, shapes[name], grams) * scale**2 for name, uses in merged.items()}
            factors = wire.example_factors(squared, self.plan)
            sums = dict(before.sums) if before is not None else {}
            for name in list(merged):
                sums[name] = self._sum(name, merged.pop(name), factors, scale, sums.get(name))
        latest = wire.ClippedSum(sums, factors.norms, factors.dropped, rows)
        return latest if before is None else before.joined(latest)

    def _sum(
        self, name: str, uses: list[Contribution], factors: wire.Factors, scale: float, into: Tensor | None
    ) -> Tensor:
        own = self.parameters[name]
        weight = (factors.of(name, self.plan) * scale).to(noise.wide(own.dtype))
        if factors.dropped:
            uses = [use.without(~factors.finite) for use in uses]
        first, *rest = uses
        total = first.weighted(weight, own.shape, into)
        for use in rest:
            total = use.weighted(weight, own.shape, total)
        return total

    def _contributions(self) -> dict[str, list[Contribution]]:
        """Trained parameter name -> its uses, in the plan's order."""
        found: dict[str, list[Contribution]] = {name: [] for name in self.parameters}
        for use in self._uses:
            own = self._own[use.layer]
            if use.input._version != use.version:
                raise RuntimeError(f"the input of {type(use.layer).__name__} was overwritten in place after it ran")
            for short, value in self._rules[use.layer](use.layer, use.input, use.gradient, frozenset(own)).items():
                found[own[short]].append(value)
        unused = [name for name, uses in found.items() if not uses]
        if unused:
            raise RuntimeError(
                f"parameter {unused[0]!r} is trained but took no part in the loss; freeze it (train: false)"
            )
        return found

    def _batch(self, merged: Mapping[str, list[Contribution]]) -> int:
        rows = {name: use.rows for name, uses in merged.items() for use in uses}
        if len(set(rows.values())) > 1:
            most = max(rows.values())
            bad = {name: n for name, n in rows.items() if n != most}
            raise RuntimeError(f"per-example gradients of {most} examples, but {bad}: a broadcast input?")
        return next(iter(rows.values()), 0)

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        return bool(self._uses)

    def clear(self) -> None:
        """Drop what the latest backward pass left."""
        self._uses.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def detach(self) -> None:
        """See `GradientMode.detach`."""
        for handle in self._handles:
            handle.remove()


def _owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """Layer -> (its own parameter name -> the model's name) for every layer that holds a trained tensor."""
    names = {id(p): name for name, p in parameters.items()}
    out = {}
    for layer in model.modules():
        own = {short: names[id(p)] for short, p in layer.named_parameters(recurse=False) if id(p) in names}
        if own:
            out[layer] = own
    return out
