"""The one function through which every exported message leaves: a policy table applied to a dict of tensors.

It knows no framework. The Flower mod, the NVFLARE filter and the training loop with Opacus's calling convention are
thin adapters over `outgoing`, and the self-test of an exported folder runs it on stored tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpguard.deploy import checks
from dpguard.deploy.checks import Content, Refused
from dpguard.engine import noise, wire
from dpguard.policy.table import Plan


@dataclass(frozen=True)
class Outgoing:
    """What `outgoing` made of an update.

    Attributes:
        wire: shared tensor -> what leaves.
        home: withheld tensor -> its noised mean gradient, for the client's own step at home; empty unless the
            content was ``clipped``.
    """

    wire: dict[str, Tensor]
    home: dict[str, Tensor] = field(default_factory=dict)


def outgoing(
    update: Mapping[str, Tensor],
    plan: Plan,
    *,
    content: Content,
    batch_size: int,
    generator: noise.Source,
    base: Mapping[str, Tensor] | None = None,
    examples: int | None = None,
    mask_seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Outgoing:
    """Apply a policy to an update that is about to leave, or refuse it.

    Clip of the whole update (where the table's unit is ``update``), noise, pruning, quantising, and nothing of what
    is withheld or frozen: the very functions of `engine.wire` that the rehearsal used, so that the same update, table
    and generator give the same tensors to the bit.

    Args:
        update: tensor name -> tensor. Of a difference (``raw``, ``noised``) every shared tensor; withheld ones may be
            there and are dropped. Of a clipped sum every trained tensor.
        plan: the table resolved against the rehearsed model.
        content: what the tensors are said to be, see `checks.Content`. The two halves of this promise that can be
            seen from the tensors are checked.
        batch_size: the PUBLIC batch size, the divisor of a clipped sum.
        generator: source of the noise. Secret in the field: `noise.SecureSource()`.
        base: the global weights that the client began from; needed for a difference.
        examples: public number of the client's examples; a clipped sum cannot be longer than so many clips.
        mask_seed: public seed of random pruning masks.
        dtype: the type of the rehearsed weights.

    Returns:
        What leaves and what stays.

    Raises:
        Refused: anything that is not what was rehearsed. Nothing was noised then, and nothing may leave.
    """
    if not plan.shared:
        raise Refused("the table shares nothing; expected no message at all")
    checks.check_content(plan, content)
    needed = plan.trained if content == "clipped" else plan.shared
    checks.check_names(update, needed, () if content == "clipped" else plan.withheld)
    hidden = content == "raw" and all(plan[name].noise for name in plan.shared)
    for name, value in update.items():
        checks.check_tensor(name, value, plan[name].slot.shape, dtype, finite=not hidden)
    if hidden:
        update = _usable(update)
    if base is not None:
        for name in needed:
            checks.check_tensor(name, base.get(name), plan[name].slot.shape, dtype)
    if content == "clipped":
        return _step(update, plan, batch_size, generator, base, examples, mask_seed)
    checks.check_difference(update, base, plan.shared)
    if not hidden:
        # an update of zeros under noise leaves as noise: telling that nothing was trained would tell who took part
        checks.check_not_zero(update, plan.shared)
    if content == "noised":
        checks.check_noised(update, plan, base)
    return Outgoing(_difference(update, plan, content, generator, mask_seed))


def _usable(update: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The update, or zeros where its training diverged: a refusal would tell so, and no noise would cover it."""
    if all(bool(torch.isfinite(value).all()) for value in update.values()):
        return update
    return {name: torch.zeros_like(value) for name, value in update.items()}


def _step(
    update: Mapping[str, Tensor], plan: Plan, batch_size: int, generator: noise.Source,
    base: Mapping[str, Tensor] | None, examples: int | None, mask_seed: int,
) -> Outgoing:  # fmt: skip
    """A gradient: noise, divide, release. An empty Poisson batch is a sum of zeros, and leaves as noise alone."""
    if base is not None and any(bool(update[name].any()) for name in plan.shared):
        checks.check_difference(update, base, plan.shared)
    for group in plan.groups.values():
        # one part in a million for the rounding of a sum over many examples
        most = group.clip * examples * (1 + 1e-6) if examples and group.unit == "example" else None
        length = torch.linalg.vector_norm(torch.stack([update[n].double().norm() for n in group.names]))
        if most is not None and float(length) > most:
            raise Refused(
                f"the sum over clip group {group.id!r} is longer than all examples at their clip; expected a sum of "
                "clipped per-example gradients"
            )
    sums = {name: update[name].detach() for name in plan.trained}
    message, home = {}, {}
    copy = wire.ClippedSum({name: value.clone() for name, value in sums.items()}, {})
    for out in wire.emit(copy, plan, batch_size=batch_size, drawn_from=generator, mask_seed=mask_seed):
        if out.wire is None:
            home[out.name] = out.mean
        else:
            message[out.name] = out.wire
    return Outgoing(message, home)


def _difference(
    update: Mapping[str, Tensor], plan: Plan, content: Content, generator: noise.Source, mask_seed: int
) -> dict[str, Tensor]:
    """A change of weights: clip and noise it as a whole where the table says so, then release it."""
    change = {name: update[name].detach() for name in plan.shared}
    bounded = wire.clip_update(change, wire.shared_only(plan), 1) if content == "raw" else change
    out = {}
    for name in plan.shared:
        rule = plan[name]
        std = rule.std(1) if rule.unit == "update" and rule.noise else rule.noise_std
        value = bounded[name].clone()
        noised = noise.add_noise_(value, std, generator) if std else value
        out[name] = wire.released_tensor(name, noised, plan, mask_seed=mask_seed)
    return out


def before_the_gate(plan: Plan) -> Plan:
    """What is left of a plan for the local steps of a client whose change goes through `outgoing`.

    Clip and noise of every example stay (they cannot be made afterwards); everything that happens to the change as a
    whole (clip of unit ``update``, uncalibrated noise, pruning, quantising) is the gate's, so that it happens once.
    """
    nothing: dict[str, Any] = {"keep": 1.0, "bits": None, "release": (), "noise_std": 0.0}
    whole = nothing | {"clip": None, "group": "", "noise": 0.0, "unit": "example"}
    rules = {name: replace(rule, **(whole if rule.unit == "update" else nothing)) for name, rule in plan.items()}
    return replace(plan, rules=rules)
