"""The proof that a text is the right one: its own message, pruned and rounded as the client did, is the one seen.

Without noise and with dropout off a message is a function of its text, so equality entry by entry proves the text.
Float32 sums differ in their last digits from machine to machine; an entry may therefore differ where it lies at a
threshold (the smallest entry kept, a rounding boundary, a sign of almost nothing), and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.engine import wire
from dpguard.engine.gradients import gradient
from dpguard.inputs.batch import Batch
from dpguard.policy.table import Rule

TOLERANCE = 1e-4
"""What rounding in float32 can move an entry by, relative to the largest (entries) or to the norm (tensors)."""
ENTRIES = 1000
"""Fewest entries that can prove a text: a handful of values may fit several texts."""
NEGLIGIBLE = 1e-6
"""A tensor this much smaller than the largest holds rounding errors (a key's bias) and proves nothing."""


def is_message(seen: Observation, text: Sequence[int], label: int) -> bool:
    """Whether a text's own message equals the one seen on every tensor that can tell.

    False under noise, in train mode (the dropout masks are unknown), for deltas and unknown release operations.
    The model must be in eval mode.

    Args:
        seen: the message of one text.
        text: token ids with special tokens.
        label: class index.
    """
    told, plan = seen.disclosed, seen.disclosed.plan
    rules = {name: plan[name] for name in seen.message if name in plan}
    noisy = any(rule.std(told.batch_size) > 0 or rule.release for rule in rules.values())
    if told.mode != "eval" or told.kind != "gradient" or noisy or told.batch_size != 1 or told.clients != 1:
        return False
    ids = torch.tensor([list(text)], device=next(iter(seen.message.values())).device)
    batch = Batch(ids, torch.ones_like(ids), torch.tensor([label], device=ids.device))
    wanted = {name: parameter.requires_grad for name, parameter in seen.model.named_parameters()}
    try:
        for name, parameter in seen.model.named_parameters():
            parameter.requires_grad_(name in set(plan.trained))
        found = gradient(seen.model, batch, plan.trained)
    finally:
        for name, parameter in seen.model.named_parameters():
            parameter.requires_grad_(wanted[name])
    clipped = wire.clip_and_sum({name: g[None] for name, g in found.items()}, plan)
    sums = wire.clip_update(clipped.sums, plan, told.batch_size)
    largest = max(float(sums[name].norm()) for name in rules)
    telling = [name for name in rules if float(sums[name].norm()) > NEGLIGIBLE * largest]
    if sum(int((seen.message[name] != 0).sum()) for name in telling) < ENTRIES:
        return False
    return all(_same(name, rules[name], sums[name], seen) for name in telling)


def _same(name: str, rule: Rule, own: Tensor, seen: Observation) -> bool:
    """Whether a tensor of a text's own gradient was released as what arrived, up to entries at a threshold."""
    plan, arrived = seen.disclosed.plan, seen.message[name].float()
    sent = wire.released_tensor(name, own.float(), plan, mask_seed=seen.disclosed.mask_seed)
    if rule.bits is None and rule.keep >= 1:
        return float((sent - arrived).norm()) <= TOLERANCE * float(sent.norm())
    slack = TOLERANCE * float(own.abs().max())
    close = (sent - arrived).abs() <= slack
    return bool((close | _at_threshold(rule, own.float(), sent, slack)).all())


def _at_threshold(rule: Rule, own: Tensor, sent: Tensor, slack: float) -> Tensor:
    """Entries that rounding in float32 may have sent to the other side of a threshold."""
    out = torch.zeros_like(own, dtype=torch.bool)
    if rule.keep < 1 and rule.prune == "magnitude":
        out |= (own.abs() - own[sent != 0].abs().min()).abs() <= slack if bool((sent != 0).any()) else True
    if rule.bits == 1:
        out |= own.abs() <= slack
    elif rule.bits is not None:
        step = float(own.abs().max()) / (2 ** (rule.bits - 1) - 1)
        out |= ((own / step).frac().abs() - 0.5).abs() * step <= slack
    return out


def without_noise(seen: Observation) -> bool:
    """Whether no tensor on the wire carries noise."""
    plan = seen.disclosed.plan
    return all(plan[name].std(seen.disclosed.batch_size) == 0 for name in seen.message if name in plan)
