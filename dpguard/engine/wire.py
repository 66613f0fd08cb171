"""What happens to per-example gradients before they leave: clip, sum, noise, release. Pure functions.

`make_message` is the only way to a message: training, observation, attack replays and exports call it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpguard.engine import noise
from dpguard.policy.table import Group, Plan

STABILISER = 0.01
"""Added to a norm before it divides (automatic clipping): small gradients stay smaller than large ones."""
CLIP_RANGE = (1e-6, 1e6)
"""An adaptive clip never leaves this range, whatever the noise on its counts does."""


@dataclass(frozen=True)
class ClippedSum:
    """Sum over the batch of clipped per-example gradients.

    Attributes:
        sums: parameter name -> tensor of the parameter's shape, float32 or wider, for every trained tensor.
        norms: clip group of unit ``example`` -> (B,) L2 norms before clipping; private, never sent.
        dropped: examples left out because a gradient entry was not finite; private, never sent.
        rows: examples in all; private, never sent.
    """

    sums: dict[str, Tensor]
    norms: dict[str, Tensor]
    dropped: int = 0
    rows: int = 0

    def plus(self, other: ClippedSum) -> ClippedSum:
        """The sum over two parts of one logical batch; this one's tensors become it."""
        return self.joined(replace(other, sums={name: v.add_(other.sums[name]) for name, v in self.sums.items()}))

    def joined(self, other: ClippedSum) -> ClippedSum:
        """The other part's sums, which hold this one's already, with the norms and counts of both."""
        norms = {key: torch.cat([norms, other.norms[key]]) for key, norms in self.norms.items()}
        return ClippedSum(other.sums, norms, self.dropped + other.dropped, self.rows + other.rows)


def empty_sum(parameters: Mapping[str, Tensor], plan: Plan) -> ClippedSum:
    """The clipped sum of a batch without examples: zeros in the shapes of ``parameters`` (name -> tensor)."""
    zeros = {
        name: torch.zeros_like(parameters[name], dtype=noise.wide(parameters[name].dtype), requires_grad=False)
        for name in plan.trained
    }
    groups = [key for key, group in plan.groups.items() if group.unit == "example"]
    return ClippedSum(zeros, {key: torch.zeros(0) for key in groups})


@dataclass(frozen=True)
class Message:
    """One step's tensors.

    Attributes:
        noised: trained tensor -> clipped sum plus noise, before the division; what an audit judges and,
            divided, what a withheld layer is updated with at home.
        wire: shared tensor -> what leaves: noised / public batch size, pruned, quantised.
    """

    noised: dict[str, Tensor]
    wire: dict[str, Tensor]


def clip_factors(norms: Tensor, clip: float, mode: str = "clip") -> Tensor:
    """(B,) factors that bring each norm down to at most ``clip``.

    Mode ``clip`` scales down what is longer; ``normalise`` scales everything to about ``clip``: automatic
    clipping, C / (norm + 0.01) (Bu et al., arXiv 2206.07136, AUTO-S), which never reaches C either.

    >>> clip_factors(torch.tensor([0.5, 4.0]), 1.0)
    tensor([1.0000, 0.2500])
    >>> clip_factors(torch.tensor([0.5, 3.99]), 1.0, "normalise")
    tensor([1.9608, 0.2500])
    """
    return clip / (norms + STABILISER) if mode == "normalise" else clip / norms.clamp(min=clip)


def clip_and_sum(per_example: Mapping[str, Tensor], plan: Plan) -> ClippedSum:
    """Clip every example to its groups' bounds and sum over the batch.

    Groups of unit ``update`` are summed as they are; `make_message` clips their sum. An example with any
    entry that is not finite is left out of every group (one bad text must not turn the release into NaN).
    Zero examples give zero sums.

    Args:
        per_example: trained parameter name -> (B, *shape) gradients of each example's own loss.
        plan: the policy.

    Raises:
        ValueError: a trained tensor has no per-example gradient, or batch dimensions differ (Opacus
            issue #841: a broadcast input gives one gradient for the whole batch).
    """
    sizes = {name: g.shape[0] for name, g in per_example.items()}
    missing = [name for name in plan.trained if name not in sizes]
    if missing or len(set(sizes.values())) > 1:
        raise ValueError(f"per-example gradients missing for {missing[:3]} or batch sizes differ: {sizes}")
    flat = {name: per_example[name].flatten(1).to(noise.wide(per_example[name].dtype)) for name in plan.trained}
    factors = example_factors({name: g.pow(2).sum(1) for name, g in flat.items()}, plan)
    sums = {}
    for name, g in flat.items():
        # a weight of 0 does not silence NaN
        kept = g if factors.dropped == 0 else g.masked_fill(~factors.finite[:, None], 0.0)
        sums[name] = (factors.of(name, plan).to(g.dtype) @ kept).reshape(plan[name].slot.shape)
    return ClippedSum(sums, factors.norms, factors.dropped, len(factors.finite))


@dataclass(frozen=True)
class Factors:
    """What every example's gradient is multiplied with before the sum.

    Attributes:
        by_group: clip group of unit ``example`` -> (B,) factors; 0 for an example that is left out.
        norms: clip group of unit ``example`` -> (B,) L2 norms before clipping; private.
        finite: (B,) False for an example with an entry that is not finite.
    """

    by_group: dict[str, Tensor]
    norms: dict[str, Tensor]
    finite: Tensor

    @property
    def dropped(self) -> int:
        """How many examples are left out; private."""
        return int((~self.finite).sum())

    def of(self, name: str, plan: Plan) -> Tensor:
        """(B,) factors of one tensor: its group's, or 1 (0 when left out) without a clip."""
        found = self.by_group.get(plan[name].group)
        return self.finite.to(torch.float32) if found is None else found


def example_factors(squared: Mapping[str, Tensor], plan: Plan) -> Factors:
    """Every example's factor in every clip group, from squared norms alone: the one rule of all gradient modes.

    Args:
        squared: trained parameter name -> (B,) squared L2 norms of each example's gradient.
        plan: the policy.
    """
    stacked = list(squared.values())
    finite = torch.stack([s.isfinite() for s in stacked]).all(0) if stacked else torch.ones(0, dtype=torch.bool)
    groups = {key: group for key, group in plan.groups.items() if group.unit == "example"}
    norms = {key: group_norms(squared, group) for key, group in groups.items()}
    for norm in norms.values():  # squares may be finite and their sum not
        finite = finite & norm.isfinite()
    by_group = {
        key: clip_factors(n.nan_to_num(posinf=0.0), groups[key].clip, groups[key].mode) * finite
        for key, n in norms.items()
    }
    return Factors(by_group, norms, finite)


def group_norms(squared: Mapping[str, Tensor], group: Group) -> Tensor:
    """(B,) L2 norms over a clip group from its tensors' squared norms."""
    return torch.stack([squared[name] for name in group.names]).sum(0).sqrt()


def shared_only(plan: Plan) -> Plan:
    """The plan with its withheld tensors out of the clip groups: only what leaves of a change is clipped."""
    kept = {name: rule if rule.sent else replace(rule, train=False) for name, rule in plan.items()}
    return replace(plan, rules=kept)


def clip_update(sums: Mapping[str, Tensor], plan: Plan, batch_size: int) -> dict[str, Tensor]:
    """Clip the client's whole update once in every group of unit ``update``; other tensors pass as they are.

    Args:
        sums: trained parameter name -> the update times the public batch size (the scale of a sum).
        plan: the policy.
        batch_size: the public batch size.

    Returns:
        The same scale; the joint norm over a group, divided by ``batch_size``, is at most its clip. A group
        with an entry that is not finite becomes zero.
    """
    out = dict(sums)
    for group in plan.groups.values():
        if group.unit != "update":
            continue
        parts = [torch.linalg.vector_norm(sums[name], dtype=torch.float64).cpu() for name in group.names]
        norm = torch.linalg.vector_norm(torch.stack(parts)) / batch_size
        if not bool(norm.isfinite()):
            out |= {name: torch.zeros_like(sums[name]) for name in group.names}
            continue
        factor = clip_factors(norm, group.clip, group.mode).item()
        out |= {name: sums[name] * factor for name in group.names}
    return out


def next_clips(
    norms: Mapping[str, Tensor], plan: Plan, generator: noise.Source, *, batch_size: int
) -> dict[str, float]:
    """Bounds of the next step where a clip follows a quantile (Andrew et al., arXiv 1905.03871, Alg. 1).

    The noised count of examples below the bound is one more coordinate of the step's Gaussian query: an
    example moves it by 1/2 at most, and one that is absent or left out counts 0. What comes out depends on
    private data through noised counts alone, so it is public; `policy.guarantee` charges for it.

    Args:
        norms: clip group -> (B,) norms of the logical batch (`ClippedSum.norms`); private.
        plan: the policy with the bounds now in force.
        generator: source of the noise; secret in a deployment.
        batch_size: the PUBLIC batch size, never the actual Poisson count.

    Returns:
        Clip group -> bound, for the groups with a quantile alone; for `Plan.with_clips`.
    """
    kept = [values.isfinite() for values in norms.values()]
    finite = torch.stack(kept).all(0) if kept else torch.ones(0, dtype=torch.bool)
    out = {}
    for key, group in plan.groups.items():
        if group.quantile is None:
            continue
        below = (norms[key] <= group.clip).double() - 0.5
        drawn = noise.normal(1, generator, torch.float64).item()
        counted = float((below * finite).sum()) + group.quantile.count_noise * drawn
        moved = group.quantile.rate * (counted / batch_size + 0.5 - group.quantile.quantile)
        # the exponent is cut first: exp overflows where a tiny batch meets a large noise
        clip = group.clip * math.exp(min(max(-moved, -30.0), 30.0))
        out[key] = min(max(clip, CLIP_RANGE[0]), CLIP_RANGE[1])
    return out


def noised_tensor(
    name: str, total: Tensor, plan: Plan, *, batch_size: int, drawn_from: noise.Source, divide: bool = False
) -> Tensor:
    """Gaussian noise of the rule's std on every entry of one tensor's sum, zeros included; ``total`` is overwritten.

    With ``divide`` the result is divided by the PUBLIC batch size in the same pass over memory.
    """
    return noise.add_noise_(total, plan[name].std(batch_size), drawn_from, divide_by=batch_size if divide else 1)


def released_tensor(name: str, mean: Tensor, plan: Plan, *, mask_seed: int = 0) -> Tensor:
    """What leaves of one shared tensor: its noised mean, pruned and quantised."""
    rule = plan[name]
    value = mean
    steps: list[tuple[str, object]] = [("prune", (rule.keep, rule.prune))] if rule.keep < 1 else []
    steps += [("quantise", rule.bits)] if rule.bits is not None else []
    for operation, setting in [*steps, *rule.release]:
        module = importlib.import_module(f"dpguard.engine.release.{operation}")
        value = module.apply(value, setting, name=name, mask_seed=mask_seed)
    return value


def release(noised: Mapping[str, Tensor], plan: Plan, *, batch_size: int, mask_seed: int = 0) -> dict[str, Tensor]:
    """What leaves of all shared tensors, from their noised sums; see `released_tensor`."""
    return {name: released_tensor(name, noised[name] / batch_size, plan, mask_seed=mask_seed) for name in plan.shared}


@dataclass(frozen=True)
class Emitted:
    """One trained tensor on its way out.

    Attributes:
        name: its name.
        noised: clipped sum plus noise; None where only the mean was asked for.
        mean: noised / public batch size: what a withheld tensor is updated with at home.
        wire: what leaves, None when withheld.
    """

    name: str
    noised: Tensor | None
    mean: Tensor
    wire: Tensor | None


def emit(
    clipped: ClippedSum,
    plan: Plan,
    *,
    batch_size: int,
    drawn_from: noise.Source,
    mask_seed: int = 0,
    keep_noised: bool = False,
) -> Iterator[Emitted]:
    """Clip the update (unit ``update``), noise, then release, tensor by tensor: the way of every message.

    The sums are used up (noised in place, then let go), so that a step needs no second copy of the model.

    Args:
        clipped: from any gradient mode, or the update of several local steps times ``batch_size``.
        plan: the policy.
        batch_size: the PUBLIC batch size (the divisor), never the actual Poisson count.
        drawn_from: source of the noise; secret in a deployment.
        mask_seed: public seed of random pruning masks.
        keep_noised: also hand out the noised sums, for audits.

    Yields:
        Every trained tensor, in the plan's order.
    """
    sums = clip_update(clipped.sums, plan, batch_size)
    clipped.sums.clear()
    shared = set(plan.shared)
    for name in plan.trained:
        value = noised_tensor(
            name, sums.pop(name), plan, batch_size=batch_size, drawn_from=drawn_from, divide=not keep_noised
        )
        mean = value / batch_size if keep_noised else value
        sent = released_tensor(name, mean, plan, mask_seed=mask_seed) if name in shared else None
        yield Emitted(name, value if keep_noised else None, mean, sent)


def make_message(
    clipped: ClippedSum, plan: Plan, *, batch_size: int, generator: noise.Source, mask_seed: int = 0
) -> Message:
    """The whole message at once; ``clipped`` stays as it is. See `emit`."""
    copy = replace(clipped, sums={name: value.clone() for name, value in clipped.sums.items()})
    message = Message({}, {})
    for out in emit(copy, plan, batch_size=batch_size, drawn_from=generator, mask_seed=mask_seed, keep_noised=True):
        if out.noised is not None:
            message.noised[out.name] = out.noised
        if out.wire is not None:
            message.wire[out.name] = out.wire
    return message
