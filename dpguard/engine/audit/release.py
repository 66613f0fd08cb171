"""Checks W and the mechanism's half of P: what leaves, and that it depends on the noised tensors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpguard.engine import wire
from dpguard.engine.audit import batches
from dpguard.engine.audit.report import Row, counted, judged, not_applicable
from dpguard.engine.audit.subject import MASK_SEED, Subject, shrunk
from dpguard.engine.release.prune import entries, random_indices
from dpguard.policy.table import Plan, Rule

LARGEST = 1024
CLOSE = 1e-12


def check(subject: Subject) -> list[Row]:
    """The rows of check W."""
    plan = shrunk(subject.plan, LARGEST)
    send = subject.mechanism(plan)
    batch = batches.make(plan, "normal", 3, subject.seed)
    messages = [send(batch, subject.seed), send(batches.nothing(batch), subject.seed + 1)]
    return [
        _names(plan, messages),
        _division(plan, messages, subject.batch_size),
        *_operations(plan, messages, subject.batch_size),
        _function_of_noised(subject, plan),
    ]


def _names(plan: Plan, messages: list[wire.Message]) -> Row:
    what = f"tensors on the wire ({len(plan) - len(plan.shared)} withheld or frozen)"
    for message in messages:
        extra = [n for n in message.wire if n not in plan.shared]
        lost = [n for n in plan.shared if n not in message.wire]
        stray = [n for n in message.noised if n not in plan.trained]
        if extra or lost or stray:
            word = "is shared" if extra else "is missing" if lost else "is trained"
            return judged(
                "W", what, f"{(extra or lost or stray)[0]} {word}", counted(len(plan.shared), "tensor"), False
            )
    return judged("W", what, counted(len(plan.shared), "tensor"), counted(len(plan.shared), "tensor"), True)


def _division(plan: Plan, messages: list[wire.Message], batch_size: int) -> Row:
    what = f"wire = noised / {batch_size}, the public batch size"
    names = [n for n in plan.shared if plan[n].whole]
    if not names:
        return not_applicable("W", what, "every shared tensor is pruned, quantised or nothing is shared")
    worst, where = 0.0, ""
    for message in messages:
        for name in (n for n in names if n in message.wire):
            off = _difference(message.wire[name] * batch_size, message.noised[name])
            if off > worst:
                worst, where = off, f" ({name})"
    return judged("W", what, f"off by {worst:.2g}{where}", "equal", worst <= CLOSE)


def _difference(first: Tensor, second: Tensor) -> float:
    """Largest difference relative to the larger of the second tensor's entries (and of the smallest number)."""
    if not second.numel():
        return 0.0
    scale = max(float(second.abs().max()), 1e-300)
    found = float((first - second).abs().max()) / scale
    return found if math.isfinite(found) else math.inf


def _operations(plan: Plan, messages: list[wire.Message], batch_size: int) -> list[Row]:
    """What pruning and quantising must look like; only registered operations are judged by running them again."""
    names = [n for n in plan.shared if not plan[n].whole]
    if not names:
        return []
    wrong = ""
    for message in messages:
        again = wire.release(message.noised, plan, batch_size=batch_size, mask_seed=MASK_SEED)
        for name in (n for n in names if n in message.wire):
            rule, sent, noised = plan[name], message.wire[name].flatten(), message.noised[name].flatten() / batch_size
            if rule.release:
                fault = "" if sent.equal(again[name].flatten()) else "is no function of the noised tensor"
            else:
                fault = _pruning_fault(rule, sent, noised) or _value_fault(rule, sent, noised)
            wrong = wrong or (f"{name} {fault}" if fault else "")
    what = f"{counted(len(names), 'tensor')} pruned, quantised or otherwise released"
    return [judged("W", what, wrong or "from the noised tensor and public seed", "from those alone", not wrong)]


def _pruning_fault(rule: Rule, sent: Tensor, noised: Tensor) -> str:
    """Which entries leave is decided by the noised magnitudes or by the public mask."""
    count = entries(rule.keep, sent.numel())
    kept = sent != 0
    if int(kept.sum()) > count:
        return f"sends {int(kept.sum())} of {sent.numel()} entries, not {count}"
    if rule.keep == 1 or not kept.any() or kept.all():
        return ""
    if rule.prune == "random":
        public = torch.zeros_like(kept)
        public[random_indices(sent.numel(), count, name=rule.slot.name, mask_seed=MASK_SEED)] = True
        return "sends entries outside the public mask" if bool((kept & ~public).any()) else ""
    least, most = noised[kept].abs().min(), noised[~kept].abs().max()
    return "" if bool(least >= most) else "does not send the largest noised entries"


def _value_fault(rule: Rule, sent: Tensor, noised: Tensor) -> str:
    """A value that leaves is the noised one, or the nearest of the levels."""
    kept = sent != 0
    if not kept.any():
        return ""
    if rule.bits is None:
        return "" if _difference(sent[kept], noised[kept]) <= CLOSE else "sends other values than the noised ones"
    if bool((sent[kept].sign() != noised[kept].sign()).any()):
        return "sends another sign than the noised one"
    if rule.bits == 1:
        return "" if bool((sent[kept].abs() == sent.abs().max()).all()) else "sends more than a sign"
    half_step = float(sent.abs().max()) / (2 ** (rule.bits - 1) - 1) / 2
    off = float((sent[kept] - noised[kept]).abs().max())
    return "" if off <= half_step * (1 + 1e-9) else f"sends values {off / half_step:.2g} half steps off"


def _same_sum(plan: Plan, seed: int) -> dict[str, tuple[batches.PerExample, batches.PerExample]]:
    """Pairs of batches of different size whose clipped sums are equal: by a zero, a dropped, a cancelled example."""
    base = batches.make(plan, "normal", 2, seed)
    one = {name: g[:1] for name, g in base.items()}
    zero = {name: torch.zeros_like(g) for name, g in one.items()}
    # powers of two below every clip, so that adding and subtracting them is exact
    up = {name: torch.sign(g) * 2.0**-20 * _power(plan[name]) for name, g in one.items()}
    down = {name: -g for name, g in up.items()}
    bad = {name: torch.full_like(g, math.nan) for name, g in one.items()}
    return {
        "a zero example": (base, batches.joined(base, zero)),
        "a dropped example": (base, batches.joined(base, bad)),
        "two that cancel": (zero, batches.joined(up, down)),
    }


def _power(rule: Rule) -> float:
    return 2.0 ** math.floor(math.log2(rule.clip)) if rule.clip else 1.0


def _function_of_noised(subject: Subject, plan: Plan) -> Row:
    """Equal noised tensors give an equal wire at the same public seed, whatever the batch was."""
    what = "equal noised tensors, other batch"
    send, compared, worst, where = subject.mechanism(plan), 0, 0.0, ""
    for kind, (first, second) in _same_sum(plan, subject.seed).items():
        here, there = send(first, subject.seed), send(second, subject.seed)
        if any(_difference(here.noised[n], there.noised[n]) > CLOSE for n in plan.trained):
            continue
        compared += 1
        for name in plan.shared:
            off = math.inf
            if name in here.wire and name in there.wire:
                off = _difference(here.wire[name], there.wire[name])
            if off > worst:
                worst, where = off, f" ({kind}, {name})"
    if not compared:
        return not_applicable("W", what, "no two batches gave equal noised tensors")
    return judged("W", what, f"{compared} pairs, wire off by {worst:.2g}{where}", "an equal wire", worst <= 1e-9)


def check_count(subject: Subject) -> list[Row]:
    """Check P on the message: the actual number of examples is not in it."""
    plan = shrunk(subject.plan, LARGEST)
    what = "actual batch size in the message"
    if not plan.shared:
        return [not_applicable("P", what, "nothing is shared")]
    send = subject.mechanism(plan)
    base = batches.make(plan, "normal", 1, subject.seed)
    zeros = {name: torch.zeros((1, *g.shape[1:]), dtype=g.dtype) for name, g in base.items()}
    reference = send(base, subject.seed).wire
    worst, where = 0.0, ""
    for more in (1, 3, 2 * subject.batch_size):
        batch = batches.joined(base, {name: z.expand(more, *z.shape[1:]) for name, z in zeros.items()})
        found = send(batch, subject.seed).wire
        for name in plan.shared:
            off = _difference(found[name], reference[name]) if name in found and name in reference else math.inf
            if off > worst:
                worst, where = off, f" ({1 + more} examples)"
    return [judged("P", what, f"off by {worst:.2g}{where}", "none", worst <= 1e-9)]
