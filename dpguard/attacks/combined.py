"""One answer from all: of what the cheaper attacks proposed, what explains the message best.

An answer that is certain of every text wins; else the one whose own message, replayed under the policy, has the
largest whitened correlation with what was seen: the Gaussian likelihood with its scale left open, so that it also
ranks answers to updates and means of several clients. The truth plays no part.

Each text's gradient is clipped as the client clips it, and one client's message is pruned and, where no noise came
before, rounded as on the wire. What an update's clip (``unit: update``) does to a group depends on tensors that are
not held and on which client a text is from; such a group has a scale of its own, also left open.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.likelihood_replay import frozen_copy
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.attacks.vocabulary import framed
from dpguard.engine import wire
from dpguard.engine.gradients import gradient
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import family_of, predicts_tokens

ROUNDING = 1e-3
"""Error of a tensor relative to its size that counts like noise: without any, tensors weigh alike."""
ENTRIES = 3_000_000
"""Entries compared for several texts, whose gradients are held side by side; one text is compared on all."""
HELD = 100_000_000
"""Entries held at once, over all texts and labels: with many of them fewer tensors are compared, the smallest."""
FLOOR = ("prior",)
"""Attacks that never read the message; their proposals are weighed like any other."""


class Combined:
    """See the module's docstring."""

    name = "combined"
    cite = "this project; the profile likelihood of a Gaussian with unknown scale"
    capability = Capability(
        "what the attacks before it proposed, and every tensor",
        "propose a text of its own",
        kinds=("gradient", "delta"),
    )
    presets = {"default": Budget(steps=0, candidates=2_000)}  # noqa: RUF012

    def applicable(self, seen: Observation) -> str:
        """Empty when attacks that read the message ran, whatever they found, else the reason.

        A message that they find nothing in counts with the best guess: left out, the mean would be over easy ones.
        """
        ran = [name for name, _ in seen.earlier if name.partition(":")[0] not in FLOOR]
        return "" if ran else "no attack that tells others what it found ran before it"

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """The best of the earlier answers, as it stands. ``notes``: ``attack``, ``correlation``. Draws nothing."""
        limit = choose(self.name, self.presets, preset, budget)[1].candidates
        offers = [(name, found) for name, found in seen.earlier if found.sequences]
        count = seen.disclosed.sequences
        sure = [
            (name, found)
            for name, found in offers
            if found.certain and all(found.certain) and count in (None, len(found.certain))
        ]
        if not offers:
            return Reconstruction([], [])
        if sure:
            name, found = sure[0]
            return Reconstruction(found.sequences, found.certain, notes={"attack": name})
        judge, spent = _Judge.of(seen), 0
        ranked: list[tuple[float, int]] = []
        for index, (_, found) in enumerate(offers):
            if spent >= limit:
                break
            value, tried = judge.correlation(seen, found.sequences)
            spent += tried
            ranked.append((value, -index))
        value, place = max(ranked)
        name, found = offers[-place]
        return Reconstruction(
            found.sequences, found.certain, candidates=spent, notes={"attack": name, "correlation": value}
        )


@dataclass(frozen=True)
class _Judge:
    """What answers are compared with.

    Attributes:
        targets: tensor -> what arrived, in the direction of a gradient.
        weights: tensor -> one over the variance of an entry.
        sizes: tensor -> its weighted squared norm.
        classes: labels that a text may have.
        model: a private copy of the public model.
    """

    targets: Mapping[str, Tensor]
    weights: Mapping[str, float]
    sizes: Mapping[str, float]
    classes: Sequence[int]
    model: nn.Module

    @staticmethod
    def of(seen: Observation) -> _Judge:
        told = seen.disclosed
        way = 1.0 if told.kind == "gradient" else -1.0
        classes = range(1 if predicts_tokens(seen.model) else int(getattr(seen.model.config, "num_labels", 1)))
        largest = max(float(value.float().norm()) for value in seen.message.values())
        names = [n for n, v in seen.message.items() if n in told.plan and float(v.float().norm()) > 1e-6 * largest]
        if told.sequences != 1:
            room = min(ENTRIES, HELD // (told.texts * len(set(told.labels or classes))))
            names = sorted(names, key=lambda n: seen.message[n].numel())
            totals = itertools.accumulate(seen.message[n].numel() for n in names)
            names = [n for n, total in zip(names, totals, strict=True) if total <= room] or names[:1]
        targets = {n: way * seen.message[n].float() for n in names}
        weights, sizes = {}, {}
        for name, value in targets.items():
            rounding, std = ROUNDING * float(value.norm()) / math.sqrt(value.numel()), seen.noise_std(name)
            # noise of unknown size: tensors weigh alike
            weights[name] = 1 / max((std if math.isfinite(std) else 0.0) ** 2 + rounding**2, 1e-30)
            sizes[name] = weights[name] * float(value.pow(2).sum())
        model = frozen_copy(seen.model, torch.float32).requires_grad_(True)
        return _Judge(targets, weights, sizes, classes, model)

    def correlation(self, seen: Observation, texts: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Whitened correlation of an answer's message with the one seen, and how many candidates that took.

        An attack's texts come in any order, so that disclosed labels say how many texts each class has, not which
        text is whose: from the order given they are swapped wherever that explains more. Labels that are not
        disclosed are chosen one text after the other. Both go twice round.
        """
        most = family_of(seen.model).max_tokens(seen.model.config)
        rows = [row for row in (framed(seen.disclosed.tokenizer, text, most) for text in texts) if row]
        if not rows:
            return -1.0, 0
        known = seen.disclosed.labels
        told = list(known) if known is not None and len(known) >= len(rows) else None
        options = sorted(set(told)) if told else list(self.classes)
        if len(rows) == 1:  # one label's gradient at a time: each is as large as all that was sent
            found = max(self._score(seen, [self._clipped(seen, rows[0], label)]) for label in options)
            return found, len(options)
        table = [{label: self._clipped(seen, row, label) for label in options} for row in rows]
        labels = told or [options[0]] * len(rows)
        best = self._score(seen, [each[label] for each, label in zip(table, labels, strict=False)])
        for _ in range(2):
            for i in range(len(rows)):
                for trial in _swapped(labels, i) if told else _relabelled(labels, i, options):
                    value = self._score(seen, [each[label] for each, label in zip(table, trial, strict=False)])
                    if value > best:
                        best, labels = value, trial
        return best, len(rows) * len(options)

    def _clipped(self, seen: Observation, row: list[int], label: int) -> dict[str, Tensor]:
        """One text's clipped gradient over what is compared."""
        told = seen.disclosed
        batch = Batch(torch.tensor([row]), torch.ones((1, len(row)), dtype=torch.int64), torch.tensor([label]))
        if predicts_tokens(seen.model):
            batch = Batch(batch.input_ids, batch.attention_mask, batch.input_ids)
        found = gradient(self.model, batch, told.plan.trained)
        sums = wire.clip_and_sum({name: g[None] for name, g in found.items()}, told.plan).sums
        return {name: sums[name].detach() for name in self.targets}

    def _score(self, seen: Observation, parts: Sequence[Mapping[str, Tensor]]) -> float:
        """Whitened correlation of a sum of texts' gradients with the message; each open scale at its best."""
        dots: dict[str, float] = {}
        squares: dict[str, float] = {}
        for name, target in self.targets.items():
            sent = self._released(seen, name, sum((part[name] for part in parts[1:]), parts[0][name]))
            rule = seen.disclosed.plan[name]
            key = rule.group if rule.unit == "update" else ""
            dots[key] = dots.get(key, 0.0) + self.weights[name] * float((sent * target).sum())
            squares[key] = squares.get(key, 0.0) + self.weights[name] * float(sent.pow(2).sum())
        explained = sum(math.copysign(dot**2, dot) / max(squares[key], 1e-30) for key, dot in dots.items())
        return math.copysign(math.sqrt(abs(explained) / max(sum(self.sizes.values()), 1e-30)), explained)

    def _released(self, seen: Observation, name: str, total: Tensor) -> Tensor:
        """What leaves of a sum: the entries that arrived; rounded, where one client rounded without noise."""
        told = seen.disclosed
        rule = told.plan[name]
        sent = total * (self.targets[name] != 0) if rule.keep < 1 else total
        if rule.bits is None or told.clients != 1 or seen.noise_std(name):
            return sent
        alone = replace(told.plan, rules={name: replace(rule, keep=1.0, release=())})
        return wire.released_tensor(name, sent, alone)


def _swapped(labels: list[int], place: int) -> Iterator[list[int]]:
    """The same labels with the one at ``place`` and a later, different one swapped."""
    for other in range(place + 1, len(labels)):
        if labels[other] != labels[place]:
            trial = list(labels)
            trial[place], trial[other] = labels[other], labels[place]
            yield trial


def _relabelled(labels: list[int], place: int, options: Sequence[int]) -> Iterator[list[int]]:
    """The labels with each other option at ``place``."""
    for label in options:
        if label != labels[place]:
            yield [*labels[:place], label, *labels[place + 1 :]]


PLUGIN = Combined()
