"""What a caller means by a policy: the plan of it for one model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.table import Plan, Policy


def resolved(policy: Policy | Plan | str | Path, model: nn.Module) -> Plan:
    """The plan of a policy for a model; a plan as it is.

    Args:
        policy: a `Policy`, a `Plan` of this very model, or what `Policy.load` reads (a file, a name, a selector).
        model: a model of a known family.

    Raises:
        UserError: anything else, or a mistake in the policy.
    """
    if isinstance(policy, Plan):
        return policy
    if isinstance(policy, (str, Path)):
        policy = Policy.load(policy)
    if not isinstance(policy, Policy):
        raise UserError(f"the policy is a {type(policy).__name__}; expected a Policy, a file of one or its name")
    return policy.plan(slots(model))


def freeze(model: nn.Module, plan: Plan) -> None:
    """Let the plan's trained tensors require gradients, and no other; the caller puts the flags back."""
    trained = set(plan.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
