"""Ways to get the clipped sum of a batch's per-example gradients from one backward pass.

`attach` readies a model, an ordinary backward pass fills it, `collect` hands out the `wire.ClippedSum`.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpguard.engine import wire
from dpguard.errors import UserError
from dpguard.policy.table import Plan


class GradientMode(Protocol):
    """One way; see `OpacusHooks` and `PlainSum`."""

    def collect(self) -> wire.ClippedSum:
        """The clipped sum of everything since the last call; per-example state is dropped."""
        ...

    def fold(self) -> None:
        """Clip and sum what went backward so far, so that a large logical batch needs the memory of a part."""
        ...

    def discard(self) -> None:
        """Forget everything since the last `collect`, folded parts included."""
        ...

    def detach(self) -> None:
        """Remove every hook from the model."""
        ...


class _Folding:
    """Keeps the running sum of a logical batch's parts; subclasses give the sum of the latest part."""

    _folded: wire.ClippedSum | None = None

    def part(self) -> wire.ClippedSum:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def fold(self) -> None:
        """See `GradientMode.fold`."""
        latest = self.part()
        self.clear()
        self._folded = latest if self._folded is None else self._folded.plus(latest)

    def collect(self) -> wire.ClippedSum:
        """See `GradientMode.collect`."""
        if self._folded is None or self.pending():
            self.fold()
        folded, self._folded = self._folded, None
        if folded is None:
            raise RuntimeError("nothing went backward since the last step")
        return folded

    def pending(self) -> bool:
        raise NotImplementedError

    def discard(self) -> None:
        """See `GradientMode.discard`."""
        self._folded = None
        self.clear()


def _conv1d(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """GPT-2's Conv1D is a Linear with a transposed weight; without this Opacus falls back to functorch."""
    out: dict[nn.Parameter, Tensor] = {}
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        out[weight] = torch.einsum("n...i,n...j->nij", activations[0], backprops)
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        out[bias] = torch.einsum("n...j->nj", backprops)
    return out


register_grad_sampler(Conv1D)(_conv1d)


class OpacusHooks(_Folding):
    """Per-example gradients by Opacus's hooks, clipped per group: exact, and the oracle of faster modes.

    Args:
        model: in train mode (hooks capture nothing in eval mode).
        plan: the policy; what it freezes must have requires_grad False already.
        loss_reduction: ``mean`` or ``sum``, as the loss of the backward pass is reduced over the batch.

    Raises:
        UserError: a trainable module that Opacus cannot handle.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.parameters = {n: p for n, p in model.named_parameters() if n in set(plan.trained)}
        # an embedding's inputs are token ids, which never need gradients: the hook is right to fire there
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            self.hooks = GradSampleHooks(model, loss_reduction=loss_reduction, strict=False)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(f"no per-example gradients for this model: {str(error).splitlines()[0]}") from error

    def part(self) -> wire.ClippedSum:
        """The clipped sum of the latest backward passes.

        Raises:
            RuntimeError: a trained parameter got no per-example gradient (unused in the forward pass), or
                one with the wrong batch dimension.
        """
        per_example = {name: self._grad_sample(name, p) for name, p in self.parameters.items()}
        rows = {g.shape[0] for g in per_example.values()}
        if len(rows) > 1:
            bad = {name: g.shape[0] for name, g in per_example.items() if g.shape[0] != max(rows)}
            raise RuntimeError(f"per-example gradients of {max(rows)} examples, but {bad}: a broadcast input?")
        return wire.clip_and_sum(per_example, self.plan)

    def _grad_sample(self, name: str, parameter: nn.Parameter) -> Tensor:
        found = getattr(parameter, "grad_sample", None)
        if found is None:
            raise RuntimeError(f"parameter {name!r} is trained but took no part in the loss; freeze it (train: false)")
        # several backward passes before one step: Opacus keeps a list, one entry a pass
        value = torch.cat(found) if isinstance(found, list) else found
        return value if isinstance(value, Tensor) else torch.as_tensor(value)

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        return any(getattr(p, "grad_sample", None) is not None for p in self.parameters.values())

    def clear(self) -> None:
        """Drop per-example gradients."""
        for parameter in self.parameters.values():
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None

    def detach(self) -> None:
        """See `GradientMode.detach`."""
        self.hooks.cleanup()


class PlainSum(_Folding):
    """For plans without any clip: the ordinary gradient, scaled back to a sum; costs what training costs.

    A step whose sum is not finite is left out whole, because no single example can be told apart.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.parameters = {n: p for n, p in model.named_parameters() if n in set(plan.trained)}
        self.mean = loss_reduction == "mean"
        self.rows = 0
        self.handle = model.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, _arguments: object, output: object) -> None:
        if torch.is_grad_enabled():
            self.rows = int(getattr(output, "logits", torch.zeros(1)).shape[0])

    def part(self) -> wire.ClippedSum:
        """The sum of the latest backward pass."""
        scale = float(self.rows) if self.mean else 1.0
        sums = {name: torch.zeros_like(p) if p.grad is None else p.grad * scale for name, p in self.parameters.items()}
        finite = all(bool(g.isfinite().all()) for g in sums.values())
        dropped = 0 if finite else self.rows
        if not finite:
            sums = {name: torch.zeros_like(g) for name, g in sums.items()}
        return wire.ClippedSum({name: g.clone() for name, g in sums.items()}, {}, dropped)

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        return any(p.grad is not None for p in self.parameters.values())

    def clear(self) -> None:
        """Drop the gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def detach(self) -> None:
        """See `GradientMode.detach`."""
        self.handle.remove()


def attach(model: nn.Module, plan: Plan, *, loss_reduction: str = "mean") -> GradientMode:
    """The cheapest mode that serves a plan: `PlainSum` when nothing is clipped, else `OpacusHooks`."""
    mode = OpacusHooks if plan.groups else PlainSum
    return mode(model, plan, loss_reduction)


def check_model(model: nn.Module, plan: Plan) -> None:
    """Refuse what would couple examples or lose gradients.

    Raises:
        UserError: batch normalisation, gradient checkpointing, or a plan of another model.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"{name!r} is batch normalisation, which couples examples; expected layer normalisation")
        if getattr(module, "gradient_checkpointing", False):
            raise UserError(f"{name or 'the model'!r} has gradient checkpointing on; expected it off")
    known = {name for name, _ in model.named_parameters()}
    strange = [name for name in plan if name not in known]
    if strange or len(known) != len(plan):
        raise UserError(
            f"the plan is of another model: it names {len(plan)} tensors ({(strange or ['-'])[0]!r} is unknown), "
            f"this one has {len(known)}"
        )
