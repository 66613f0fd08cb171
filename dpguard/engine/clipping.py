"""The gradient modes by name, and what no mode may be attached to."""

from __future__ import annotations

from torch import nn

from dpguard.engine.gradients import check_task
from dpguard.engine.modes.base import GradientMode
from dpguard.engine.modes.fast import Fast
from dpguard.engine.modes.loop import Loop
from dpguard.engine.modes.opacus import OpacusHooks
from dpguard.engine.modes.plain import PlainSum
from dpguard.errors import UserError, did_you_mean
from dpguard.policy.table import Plan

MODES: dict[str, type[Fast] | type[OpacusHooks] | type[Loop]] = {"fast": Fast, "opacus": OpacusHooks, "loop": Loop}
"""``fast``: book-keeping; ``opacus``: Opacus's hooks, the oracle; ``loop``: one example at a time."""


def attach(model: nn.Module, plan: Plan, *, loss_reduction: str = "mean", grad_mode: str = "fast") -> GradientMode:
    """Ready a model: an ordinary backward pass then fills the mode, `GradientMode.collect` empties it.

    Args:
        model: in train mode; what the plan freezes must have requires_grad False already.
        plan: the policy; where nothing is clipped the ordinary gradient serves, whatever ``grad_mode`` says.
        loss_reduction: ``mean`` or ``sum``, as the loss of the backward pass is reduced over the batch.
        grad_mode: a key of `MODES`.

    Raises:
        UserError: an unknown mode, or a trained layer that the mode cannot handle.
    """
    check_mode(grad_mode)
    if all(group.unit != "example" for group in plan.groups.values()):
        return PlainSum(model, plan, loss_reduction)
    return per_example(model, plan, loss_reduction, grad_mode)


def per_example(model: nn.Module, plan: Plan, loss_reduction: str, grad_mode: str) -> GradientMode:
    """As `attach`, and per example also where nothing is clipped, so that a bad example is left out alone."""
    return MODES[grad_mode](model, plan, loss_reduction)


def check_mode(grad_mode: str) -> None:
    """Refuse an unknown gradient mode with a UserError."""
    if grad_mode not in MODES:
        raise UserError(f"unknown grad_mode {grad_mode!r}{did_you_mean(grad_mode, list(MODES))}")


def check_layers(model: nn.Module) -> None:
    """Refuse what would couple examples or lose gradients.

    Raises:
        UserError: batch normalisation or gradient checkpointing.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"{name!r} is batch normalisation, which couples examples; expected layer normalisation")
        if getattr(module, "gradient_checkpointing", False):
            raise UserError(f"{name or 'the model'!r} has gradient checkpointing on; expected it off")


def check_model(model: nn.Module, plan: Plan) -> None:
    """`check_layers` and `check_task`, and that the plan is this model's.

    Raises:
        UserError: see `check_layers` and `check_task`; or a plan of another model.
    """
    check_layers(model)
    check_task(model)
    known = {name for name, _ in model.named_parameters()}
    strange = [name for name in plan if name not in known]
    if strange or len(known) != len(plan):
        raise UserError(
            f"the plan is of another model: it names {len(plan)} tensors ({(strange or ['-'])[0]!r} is unknown), "
            f"this one has {len(known)}"
        )
