"""Opacus: training in one place with Opacus's calling convention, under the table and a ledger."""

from __future__ import annotations

from dpguard.deploy.exporters.base import Exporter
from dpguard.deploy.rehearsal import Rehearsal
from dpguard.errors import UserError
from dpguard.report.text import count


def _check(made: Rehearsal) -> None:
    """One place, one gradient a step.

    Raises:
        UserError: what was rehearsed sends changes of weights after local steps.
    """
    if made.message.kind != "gradient":
        raise UserError(
            f"policy {made.policy!r} was rehearsed with {count(made.message.local_steps, 'local step')} a message, "
            "and a training loop sends every step's gradient; expected --to flower or nvflare, or a study without "
            "local steps"
        )


def opacus_arguments(made: Rehearsal) -> dict[str, object] | None:
    """What stock Opacus's ``make_private`` would be given for the same mechanism; None where it has none.

    One clip group over everything that is trained and shared, one noise multiplier, nothing done afterwards. Stock
    Opacus divides by the expected batch size too, so with these arguments it runs the same mechanism.
    """
    plan = made.plan
    groups = list(plan.groups.values())
    plain = len(groups) == 1 and groups[0].unit == "example" and groups[0].mode == "clip" and not plan.withheld
    rules = [plan[name] for name in plan.trained]
    noises = {rule.noise for rule in rules}
    if not plain or len(noises) != 1 or any(rule.clip is None or rule.describe() or rule.noise_std for rule in rules):
        return None
    return {"noise_multiplier": noises.pop(), "max_grad_norm": groups[0].clip, "poisson_sampling": True}


def _values(made: Rehearsal) -> dict[str, str]:
    stock = opacus_arguments(made)
    given = ", ".join(f"{name}={value}" for name, value in (stock or {}).items())
    words = (
        f"Stock Opacus runs the same mechanism with make_private(..., {given})"
        if stock
        else "Stock Opacus has no arguments for this table; dpguard's engine reads it from policy.yaml"
    )
    names = {"fedsgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    return {"STOCK": words, "OPTIMIZER": names.get(made.message.server, "Adam")}


PLUGIN = Exporter("a training loop with Opacus's calling convention, and stock Opacus's arguments", _check, _values)
