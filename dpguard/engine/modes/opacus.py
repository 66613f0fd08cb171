"""Per-example gradients by Opacus's hooks: slow, and the oracle of the fast mode."""

from __future__ import annotations

import warnings

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpguard.engine import wire
from dpguard.engine.modes.base import NOTHING, GradientMode, trained_parameters
from dpguard.engine.modes.layers import check_callable
from dpguard.errors import UserError
from dpguard.policy.table import Plan


def _conv1d(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """GPT-2's Conv1D is a Linear with a transposed weight; without this Opacus falls back to functorch."""
    out: dict[nn.Parameter, Tensor] = {}
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        given = activations[0].to(backprops.dtype)  # under autocast a layer is given float32 and works in 16 bits
        out[weight] = torch.einsum("n...i,n...j->nij", given, backprops)
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        out[bias] = torch.einsum("n...j->nj", backprops)
    return out


register_grad_sampler(Conv1D)(_conv1d)


class OpacusHooks(GradientMode):
    """Per-example gradients by Opacus's hooks, clipped per group: exact, and the oracle of faster modes.

    One difference from autograd: Opacus also gives the padding row of an embedding its gradient, where the model
    lets padding reach the loss at all (none of the supported families does).

    Args:
        model: in train mode (hooks capture nothing in eval mode).
        plan: the policy; what it freezes must have requires_grad False already.
        loss_reduction: ``mean`` or ``sum``, as the loss of the backward pass is reduced over the batch.

    Raises:
        UserError: a trainable module that Opacus cannot handle.
    """

    def __init__(self, model: nn.Module, plan: Plan, loss_reduction: str) -> None:
        self.plan = plan
        self.parameters = trained_parameters(model, plan)
        for path, layer in model.named_modules():
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                check_callable(layer, path)
        # an embedding's inputs are token ids, which never need gradients: the hook is right to fire there
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            self.hooks = GradSampleHooks(model, loss_reduction=loss_reduction, strict=False)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(f"no per-example gradients for this model: {str(error).splitlines()[0]}") from error

    def part(self, before: wire.ClippedSum | None) -> wire.ClippedSum:
        """The clipped sum of the latest backward passes, added to ``before``.

        Raises:
            RuntimeError: a trained parameter got no per-example gradient (unused in the forward pass), or
                one with the wrong batch dimension.
        """
        if not self.pending():
            raise UserError(NOTHING)
        per_example = {name: self._grad_sample(name, p) for name, p in self.parameters.items()}
        rows = {g.shape[0] for g in per_example.values()}
        if len(rows) > 1:
            bad = {name: g.shape[0] for name, g in per_example.items() if g.shape[0] != max(rows)}
            raise RuntimeError(f"per-example gradients of {max(rows)} examples, but {bad}: a broadcast input?")
        latest = wire.clip_and_sum(per_example, self.plan)
        return latest if before is None else before.plus(latest)

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
