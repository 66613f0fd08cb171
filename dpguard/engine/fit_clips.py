"""Clips fitted to what gradients measure on PUBLIC texts, clip group by clip group.

A clip far above the norms drowns the signal in its own noise, one far below throws most of it away, and the norms
of two layers differ by orders of magnitude. The noise multiplier, and so the guarantee, does not depend on the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpguard.engine.client import Client
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import slots
from dpguard.policy.clips import with_group_clips
from dpguard.policy.columns import number
from dpguard.policy.table import Group, Plan, Policy

Norms = NDArray[np.float64]
DIGITS = 3
"""Significant digits of a fitted clip."""
ROUNDING = 1e-7
"""A norm below this fraction of the example's norm over all groups is rounding (the bias of attention keys: its
gradient is zero by the softmax's shift invariance, float32 leaves about 1e-9)."""


@dataclass(frozen=True)
class FittedGroup:
    """One clip group.

    Attributes:
        id: its name in the plan of the policy that was given.
        layers: the selectors of its row in the fitted policy.
        norms: (n,) norms of the public texts' gradients over the group.
        before: the bound as given.
        clip: the bound now.
        kept: why the bound was left as it was, "" when it was fitted.
    """

    id: str
    layers: tuple[str, ...]
    norms: Norms
    before: float
    clip: float
    kept: str = ""

    @property
    def above(self) -> float:
        """Share of the public texts whose norm is above the bound: the share that it clips."""
        return float((self.norms > self.clip).mean())


@dataclass(frozen=True)
class Fitted:
    """A policy with fitted clips, and how it came about.

    Attributes:
        policy: a new policy; its plan is the given one's but for clips and group ids.
        groups: every clip group, in the model's order.
        quantile: of the norms, as asked.
        examples: public texts that counted.
        dropped: public texts left out because a gradient entry was not finite.
    """

    policy: Policy
    groups: tuple[FittedGroup, ...]
    quantile: float
    examples: int
    dropped: int


def group_norms(model: nn.Module, plan: Plan, batches: Iterable[Batch], *, grad_mode: str = "fast") -> dict[str, Norms]:
    """Per-example gradient norms of every clip group, dropout off, as the engine that trains computes them.

    The norms are exact and without noise: of PUBLIC texts only, if they or anything made of them is to leave.

    Args:
        model: at the weights to measure at; left as it was found.
        plan: of this model; groups of unit ``update`` have no per-example norm and are absent.
        batches: encoded public texts with labels.
        grad_mode: ``fast``, ``opacus`` or ``loop``.

    Returns:
        clip group id -> (n,) norms, n the same for all; texts with a gradient entry that is not finite are
        left out.

    Raises:
        UserError: an unknown ``grad_mode``, a plan of another model, a layer that the mode cannot handle.
    """
    return _measure(model, plan, batches, grad_mode)[0]


def fit(
    policy: Policy,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    quantile: float = 0.5,
    grad_mode: str = "fast",
) -> Fitted:
    """Set every clip to a quantile of the norms of PUBLIC texts, clip group by clip group.

    The texts must be public: the clips are computed from them without noise and published with the policy, and
    no epsilon covers that. A row whose ``per`` makes several groups becomes one row a group. Clips are rounded
    upwards to 3 significant digits. Adaptive clips follow their own quantile and are left alone, and so is a
    group whose gradient is zero (or rounding) at that quantile. Under ``mode: normalise``, where every example is
    scaled to the bound, the quantile is the usual size of what it is scaled from.

    Args:
        policy: the table; not changed.
        model: at the weights that training starts from: norms move as it goes on.
        batches: encoded public texts with labels; gone through once.
        quantile: the fraction of the texts that is not clipped, in (0, 1).
        grad_mode: see `group_norms`.

    Raises:
        UserError: a quantile out of range, nothing with a fixed clip to fit, ``unit: update``, no text with a
            finite gradient, a table too intricate to split (see `policy.clips`), or as `group_norms`.
    """
    quantile = check_quantile(quantile)
    found_slots = slots(model)
    plan = policy.plan(found_slots)
    check_fittable(plan)
    norms, dropped = _measure(model, plan, batches, grad_mode)
    examples = len(next(iter(norms.values())))
    if not examples:
        raise UserError(
            f"none of the {dropped} public texts has a finite gradient; expected at least one"
            if dropped
            else "no public texts; expected at least one"
        )
    total = np.sqrt(sum(n**2 for n in norms.values()))
    fitted, kept = {}, {}
    for key, group in plan.groups.items():
        at = float(np.quantile(norms[key], quantile, method="inverted_cdf"))
        if group.quantile is not None:
            kept[key] = "the clip follows its own quantile by noised counts"
        elif at <= ROUNDING * float(np.quantile(total, quantile, method="inverted_cdf")):
            kept[key] = "the gradient is zero (or rounding) at this quantile"
        else:
            fitted[key] = _round_up(at)
    new = with_group_clips(policy, found_slots, fitted)
    after = new.plan(found_slots)
    groups = tuple(_group(group, new, after, norms[key], kept.get(key, "")) for key, group in plan.groups.items())
    return Fitted(new, groups, quantile, examples, dropped)


def check_quantile(quantile: float) -> float:
    """The quantile as a number.

    Raises:
        UserError: it is not inside (0, 1).
    """
    try:
        return number(quantile, above=0, below=1)
    except UserError as error:
        raise UserError(f"quantile {error.sentence}") from None


def check_fittable(plan: Plan) -> None:
    """Refuse a plan in which no clip can be fitted, before any gradient is computed.

    Raises:
        UserError: whole-update clips, no clip, or adaptive clips alone.
    """
    name = f"policy {plan.name!r}" if plan.name else "the policy"
    if plan.unit == "update":
        raise UserError(
            f"{name} clips the client's whole update (unit: update), whose norm no single public text has; "
            "expected unit: example"
        )
    if not plan.groups:
        raise UserError(f"{name} has no clip, so there is nothing to fit; expected a row such as {{clip: 1.0}}")
    if all(group.quantile is not None for group in plan.groups.values()):
        raise UserError(
            f"every clip of {name} follows its own quantile as it trains, so there is nothing to fit; expected a "
            "number as clip"
        )


def _measure(model: nn.Module, plan: Plan, batches: Iterable[Batch], grad_mode: str) -> tuple[dict[str, Norms], int]:
    """Norms of the examples whose gradient is finite, and how many are not."""
    client = Client(model, plan, grad_mode=grad_mode)
    parts: dict[str, list[Norms]] = {key: [] for key, group in plan.groups.items() if group.unit == "example"}
    dropped = 0
    for batch in batches:
        for norms in _finite(client, batch):
            for key, values in parts.items():
                values.append(norms[key])
            dropped -= len(next(iter(norms.values()), ()))
        dropped += len(batch)
    empty = np.zeros(0)
    return {key: np.concatenate([empty, *values]) for key, values in parts.items()}, dropped


def _finite(client: Client, batch: Batch) -> Iterator[dict[str, Norms]]:
    """Norms of a batch without the examples that the engine leaves out; one at a time where there are any."""
    clipped = client.clipped(batch)
    if not clipped.dropped:
        yield {key: n.detach().to("cpu", torch.float64).numpy() for key, n in clipped.norms.items()}
    elif len(batch) > 1:
        for index in range(len(batch)):
            yield from _finite(client, batch.rows(slice(index, index + 1)))


def _group(group: Group, new: Policy, after: Plan, norms: Norms, kept: str) -> FittedGroup:
    rule = after[group.names[0]]
    row = new._read[int(rule.group.split()[1]) - 1]
    return FittedGroup(group.id, row.layers, norms, group.clip, rule.clip or group.clip, kept)


def _round_up(value: float) -> float:
    """Three significant digits, never below the value."""
    return float(Context(prec=DIGITS, rounding=ROUND_CEILING).create_decimal(Decimal(value)))
