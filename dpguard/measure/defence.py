"""Does the defence do what its table says? Measured in every cell on messages of the kind that it attacks.

A gradient is judged just after the noise. The change after local steps is clipped and noised in another place, so it is
judged itself, as it leaves but for pruning and quantising.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import chi2
from torch import Tensor

from dpguard.engine.client import Client
from dpguard.engine.local import LocalTraining
from dpguard.engine.update import Update
from dpguard.inputs.batch import Batch
from dpguard.inputs.models import LoadedModel
from dpguard.measure.threat import Threat
from dpguard.policy.table import Group, Plan, Rule

ALPHA = 1e-9
"""Chance of a false alarm a tensor: a study has thousands of them."""
HIDDEN = 0.1
"""Rounding of the weights that may move them by a larger share of a bound or a noise would hide a mistake in it."""


class DefenceError(RuntimeError):
    """The emitted tensors do not obey the table, or nothing can tell: the cell fails with it."""


@dataclass(frozen=True)
class Effect:
    """What was measured.

    Attributes:
        clip: clip group -> (norm of one example's contribution, bound C); of a change of weights that of all texts in
            all steps, and what clip, step size and divisor allow them.
        noise: part of the model -> (measured std, claimed std) of the sum's noise, or of that on the change.
        judged: what it was measured on, in words.
    """

    clip: dict[str, tuple[float, float]]
    noise: dict[str, tuple[float, float]]
    judged: str


def check(client: Client, batch: Batch, *, seed: int = 0) -> Effect:
    """Measure clip and noise on a client's own gradient messages.

    Noise: the difference of two messages of one batch. Clip: the difference of the messages with and
    without the last example at the same noise. Wire: exactly the plan's shared tensors.

    Raises:
        DefenceError: something leaves that should not, a norm above its bound, or noise of another size.
    """
    client = replace(client, batch_size=client.batch_size or max(1, len(batch)))  # one divisor for all three
    plan, divisor = client.plan, client.batch_size or 1
    first = client.message(batch, torch.Generator().manual_seed(seed))
    again = client.message(batch, torch.Generator().manual_seed(seed + 1))
    fewer = client.message(batch.rows(slice(0, len(batch) - 1)), torch.Generator().manual_seed(seed))
    _check_wire(first.wire, plan)

    def bound(group: Group) -> float:
        # a whole update that changes may turn from C to -C, on the scale of the sum
        return group.clip if group.unit == "example" else 2 * group.clip * divisor

    def rounding(name: str) -> float:
        # both messages were rounded to the tensor's own precision when the noise was added
        return 2**-22 * _norm([first.noised[name]])

    return Effect(
        clip=_clip(plan, first.noised, fewer.noised, bound, rounding),
        noise=_noise([plan[n] for n in plan.trained], first.noised, again.noised, lambda rule: rule.std(divisor)),
        judged="the sum of clipped gradients of one batch, just after the noise",
    )


def check_change(threat: Threat, model: LoadedModel, plan: Plan, batches: Sequence[Batch], *, seed: int = 0) -> Effect:
    """The same of messages that are the change of the weights after local steps.

    Noise: the difference of two messages whose steps drew no text, which is Gaussian whatever the number of steps.
    Clip: the difference of the messages with and without all texts at the same noise. Where the weights' own rounding
    hides too much of either (in 16 bits, or with tiny steps), the messages are made anew from a copy in float64.

    Args:
        threat: makes the messages, as it makes those that are attacked.
        model: at any weights.
        plan: the policy.
        batches: one a client.
        seed: of the noise.

    Raises:
        DefenceError: as `check`; or a bound or noise that float64 does not show either.
    """
    linear = threat.linear()
    whole = replace(plan, rules={name: replace(rule, keep=1.0, bits=None, release=()) for name, rule in plan.items()})
    found, copied = _messages(linear, model, whole, batches, seed), ""
    if found.hidden():
        narrow = sorted({str(p.dtype).removeprefix("torch.") for p in model.module.parameters()})
        copied = f", on a copy of the weights in float64, because rounding in {' and '.join(narrow)} hides too much"
        wide = replace(model, module=copy.deepcopy(model.module).double())
        found = _messages(linear, wide, whole, batches, seed)
    if blurred := found.hidden():
        raise DefenceError(f"{blurred} is too small beside the weights' own rounding to be measured, even in float64")
    rules = [plan[name] for name in plan.shared]
    return Effect(
        clip=_clip(plan, found.full.tensors, found.empty.tensors, found.bound, found.rounding),
        noise=_noise(rules, found.empty.tensors, found.again.tensors, found.std, found.rounding),
        judged=_words(found.full, threat is not linear) + copied,
    )


@dataclass(frozen=True)
class _Messages:
    """Changes of one model's weights: with all texts, and twice without any.

    Attributes:
        plan: the policy, of whole messages.
        weights: shared tensor -> its weights.
        full, empty: at the same noise.
        again: without texts, at other noise.
        most: texts of the largest batch.
    """

    plan: Plan
    weights: dict[str, Tensor]
    full: Update
    empty: Update
    again: Update
    most: int

    def bound(self, group: Group) -> float:
        """How far all texts in all steps may move a clip group."""
        if group.unit == "update":
            return group.clip
        return sum(_step_weights(self.full)) * self.most * group.clip / self.full.batch_size

    def std(self, rule: Rule) -> float:
        """What the table claims of the noise."""
        return _change_std(rule, self.full)

    def rounding(self, name: str) -> float:
        """How far rounding alone may move a tensor between two of the messages."""
        sent = self.full.tensors[name]
        size = _norm([sent]) + _norm([self.empty.tensors[name]])
        if self.plan[name].unit == "update":  # clipped and noised after the last step
            return 4 * torch.finfo(sent.dtype).eps * size
        # each step of both rounds the weights by half an eps at most; as much again for the optimizer's own
        start = self.weights[name]
        return 2 * self.full.local_steps * torch.finfo(start.dtype).eps * (size + _norm([start]))

    def hidden(self) -> str:
        """A clip or noise of which rounding may hide more than `HIDDEN`, or "" ."""
        for key, group in self.plan.groups.items():
            names = [name for name in group.names if name in self.full.tensors]
            if math.hypot(*(self.rounding(n) for n in names)) > HIDDEN * self.bound(group):
                return f"the bound of clip group {key!r}"
        for name in self.plan.shared:
            claimed = self.std(self.plan[name])
            if claimed and self.rounding(name) > HIDDEN * claimed * math.sqrt(self.full.tensors[name].numel()):
                return f"the noise on {name!r}"
        return ""


def _messages(threat: Threat, model: LoadedModel, plan: Plan, batches: Sequence[Batch], seed: int) -> _Messages:
    def send(noise_seed: int, *, texts: bool) -> Update:
        return threat.message(model, plan, batches, noise_seed=noise_seed, texts=texts)

    full, empty, again = send(seed, texts=True), send(seed, texts=False), send(seed + 1, texts=False)
    _check_wire(full.tensors, plan)
    named = dict(model.module.named_parameters())
    weights = {name: named[name].detach() for name in plan.shared}
    return _Messages(plan, weights, full, empty, again, max(len(batch) for batch in batches))


def _words(update: Update, other: bool) -> str:
    steps = f"{update.local_steps} local step{'s' if update.local_steps > 1 else ''}"
    whose = f", mean of {update.clients} clients" if update.clients > 1 else ""
    return f"the change of the weights after {steps}{' of plain SGD' if other else ''}{whose}, before any pruning"


def _step_weights(update: Update) -> list[float]:
    """How far each local step's gradient moves the weights in the end: the learning rate, more with momentum."""
    training = update.training or LocalTraining()
    steps = range(update.local_steps)
    return [training.learning_rate * sum(training.momentum**later for later in steps[: len(steps) - k]) for k in steps]


def _change_std(rule: Rule, update: Update) -> float:
    """What the table claims of the noise on one entry of a change: of every step, or once on the whole."""
    whole = rule.noise_std if rule.unit == "example" or not rule.noise else rule.std(1)
    each = rule.std(update.batch_size) / update.batch_size if rule.unit == "example" and rule.noise else 0.0
    return math.hypot(whole, each * math.hypot(*_step_weights(update))) / math.sqrt(update.clients)


def _check_wire(sent: dict[str, Tensor], plan: Plan) -> None:
    if set(sent) != set(plan.shared):
        raise DefenceError(f"on the wire: {sorted(set(sent) ^ set(plan.shared))} against the plan")


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().pow(2).sum()) for value in tensors))


def _clip(
    plan: Plan,
    full: dict[str, Tensor],
    fewer: dict[str, Tensor],
    bound: Callable[[Group], float],
    rounding: Callable[[str], float],
) -> dict[str, tuple[float, float]]:
    out = {}
    for key, group in plan.groups.items():
        names = [name for name in group.names if name in full]
        if not names:
            continue
        moved, most = _norm([full[n].double() - fewer[n].double() for n in names]), bound(group)
        if moved > most * (1 + 1e-5) + math.hypot(*(rounding(n) for n in names)):
            raise DefenceError(f"clip group {key!r} was moved by {moved:.6g}, above its bound {most:g}")
        out[key] = (moved, most)
    return out


def _noise(
    rules: Sequence[Rule],
    first: dict[str, Tensor],
    again: dict[str, Tensor],
    claim: Callable[[Rule], float],
    rounding: Callable[[str], float] = lambda name: 0.0,
) -> dict[str, tuple[float, float]]:
    squares: dict[tuple[str, float], list[float]] = {}
    for rule in rules:
        name, claimed = rule.slot.name, claim(rule)
        difference = (first[name].double() - again[name].double()) / math.sqrt(2)
        if claimed == 0:
            if bool(difference.any()):
                raise DefenceError(f"{name!r} is noised against the plan")
            continue
        norm, count, slack = _norm([difference]), difference.numel(), rounding(name)
        low, high = (claimed * math.sqrt(at) for at in (chi2.ppf(ALPHA, count), chi2.isf(ALPHA, count)))
        if not low - slack <= norm <= high + slack:
            measured = norm / math.sqrt(count)
            raise DefenceError(f"noise on {name!r} has std {measured:.4g}, the table claims {claimed:.4g}")
        total = squares.setdefault((rule.slot.part, claimed), [0.0, 0.0])
        total[0] += (norm / claimed) ** 2
        total[1] += count
    return {
        part if sum(p == part for p, _ in squares) == 1 else f"{part} at {claimed:g}": (
            claimed * math.sqrt(squared / count),
            claimed,
        )
        for (part, claimed), (squared, count) in squares.items()
    }
