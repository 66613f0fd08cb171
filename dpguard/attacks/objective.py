"""How far candidate texts are from the message: per-tensor cosine, or whitened distance under noise.

The message is compared as the policy made it: groups are clipped, entries that were pruned are left
out, quantised tensors are compared after the same rounding (straight-through gradient). The mean over several clients
is taken as if it had been pruned and rounded once, and a change of weights as one step's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.attacks.replay import Rows, Tap, clip_rows, find_taps, form, record
from dpguard.attacks.replay_stacked import Stacked
from dpguard.engine import wire
from dpguard.inputs.batch import Batch
from dpguard.policy.table import Plan

NEGLIGIBLE = 1e-6
ABSOLUTE = 0.01
"""Weight of absolute beside squared distances."""
TELLING = ("value", "qkv", "attention_output", "query", "mlp_in", "mlp_out", "key")
"""Roles of matrices in the order in which they are kept when only a few are to be written out."""


@dataclass(frozen=True)
class Target:
    """One tensor of the message, in units of the sum over the batch.

    Attributes:
        tap: where a candidate's gradient of it comes from.
        value: the tensor, float32.
        std: standard deviation of the noise on each entry.
        kept: entries that arrived (None: all of them).
        release: the plan of this tensor alone, when it was quantised or released otherwise.
    """

    tap: Tap
    value: Tensor
    std: float
    kept: Tensor | None = None
    release: Plan | None = None


@dataclass(frozen=True)
class Parts:
    """Per tensor and message: (tensors, R) inner products and squared norms, (tensors,) squared targets.

    ``gaps`` are (tensors, R) absolute distances, None where the objective does not ask for them.
    """

    dots: Tensor
    squares: Tensor
    targets: Tensor
    gaps: Tensor | None = None


def cosine_distance(parts: Parts) -> Tensor:
    """(R,) mean over tensors of 1 - cos(g, g'), from 0 to 2.

    >>> cosine_distance(Parts(torch.tensor([[3.0]]), torch.tensor([[9.0]]), torch.tensor([1.0])))
    tensor([0.])
    """
    lengths = (parts.squares * parts.targets[:, None]).clamp(min=1e-30).sqrt()
    return (1 - parts.dots / lengths).mean(0)


def whitened_distance(parts: Parts, stds: Tensor) -> Tensor:
    """(R,) sum over tensors of (||g||² - 2 <g, m>) / std²: -2 log-likelihood up to a constant."""
    return ((parts.squares - 2 * parts.dots) / stds[:, None].pow(2)).sum(0)


def euclidean_distance(parts: Parts) -> Tensor:
    """(R,) sum over tensors of ||g - g'||² (DLG, arXiv 1906.08935), plus `ABSOLUTE` ||g - g'||_1 where it was
    measured (TAG, arXiv 2103.06819).

    >>> euclidean_distance(Parts(torch.tensor([[3.0]]), torch.tensor([[9.0]]), torch.tensor([1.0])))
    tensor([4.])
    """
    squares = (parts.squares - 2 * parts.dots + parts.targets[:, None]).sum(0)
    return squares if parts.gaps is None else squares + ABSOLUTE * parts.gaps.sum(0)


class Objective:
    """Scores candidates against one message.

    Args:
        seen: the message and what is disclosed.
        texts: texts a message holds; consecutive rows of a batch form one message.
        aware: replay clip, pruning and rounding and whiten the noise; False compares what arrived by
            cosine, as the published attacks do.
        distance: "cosine", "l2" or "l1" (see `euclidean_distance`; "l1" forms every gradient).
        few: compare at most so many of the tensors whose gradients have to be written out (see `telling`); 0 = all.

    Attributes:
        targets: the tensors that are compared.
        ignored: names of tensors on the wire that cannot be compared.
        whitened: whether the whitened distance is used (every compared tensor is noisy).
        scale: what whitened distances are divided by, see `calibrate`.
    """

    def __init__(self, seen: Observation, texts: int, *, aware: bool, distance: str = "cosine", few: int = 0) -> None:
        self.model, self.plan, self.texts = seen.model, seen.disclosed.plan, texts
        self.distance = distance
        found, self.ignored = targets(seen, aware=aware)
        found = telling(found, few) if few else found
        clean = [target for target in found if target.std == 0]
        # Noise can't hide what clean tensors show, and by the likelihood a clean tensor outweighs all others.
        self.targets = (clean or found) if aware else found
        self.energies = torch.stack([_energy(target) for target in self.targets]) if self.targets else torch.empty(0)
        whole = [target.kept is None and target.release is None for target in self.targets]
        self.intact = [index for index, intact in enumerate(whole) if intact]
        self.whitened = aware and not clean and bool(found)
        self.clipped = aware and bool(self.plan.groups) and (self.whitened or texts > 1)
        grouped = {name for group in self.plan.groups.values() for name in group.names} if self.clipped else set()
        names = grouped | {target.tap.slot.name for target in self.targets}
        self.taps = find_taps(seen.model, [rule.slot for name, rule in self.plan.items() if name in names])
        self.batch_size = seen.disclosed.batch_size
        self.mask_seed = seen.disclosed.mask_seed
        # each client clips its own update; consecutive texts of a candidate are one client's
        clients = seen.disclosed.clients
        self.together = texts // clients if texts % clients == 0 else texts
        self.scale = 1.0

    @cached_property
    def stacked(self) -> Stacked:
        """What compares the tensors that arrived whole; made when something is compared, because it takes its time."""
        found = [self.targets[index] for index in self.intact]
        return Stacked([t.tap for t in found], [t.value for t in found], [t.std == 0 for t in found])

    def parts(self, batch: Batch, embeddings: Tensor, *, create_graph: bool = False) -> Parts:
        """Inner products and norms of N / texts candidate messages; see `Parts`."""
        rows = record(self.model, self.taps, batch, embeddings, create_graph=create_graph)
        clipped = self._clip(rows) if self.clipped else {"": rows}
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        seen = [self._rows(self.targets[index], clipped) for index in self.intact]
        if seen:
            pairs.update(zip(self.intact, zip(*self.stacked(seen), strict=True), strict=True))
        for index, target in enumerate(self.targets):
            if index not in pairs:
                pairs[index] = self._formed(target, clipped)
        dots, squares = (torch.stack(side) for side in zip(*(pairs[i] for i in range(len(pairs))), strict=True))
        gaps = torch.stack([self._gap(target, clipped) for target in self.targets]) if self.distance == "l1" else None
        return Parts(dots, squares, self.energies, gaps)

    def __call__(self, batch: Batch, embeddings: Tensor, *, create_graph: bool = False) -> Tensor:
        """(N / texts,) distances; lower is nearer.

        Args:
            batch: N candidate texts; only mask and labels are read.
            embeddings: (N, L, d) token embeddings.
            create_graph: for a derivative with respect to the embeddings.
        """
        parts = self.parts(batch, embeddings, create_graph=create_graph)
        if not self.whitened:
            return cosine_distance(parts) if self.distance == "cosine" else euclidean_distance(parts)
        stds = parts.dots.new_tensor([target.std for target in self.targets])
        return whitened_distance(parts, stds) / self.scale

    def calibrate(self, batch: Batch, embeddings: Tensor) -> None:
        """Measure whitened distances in units of the mean energy ||g||² / std² of these candidates."""
        if self.whitened:
            squares = self.parts(batch, embeddings).squares
            stds = squares.new_tensor([target.std for target in self.targets])
            self.scale = float((squares / stds[:, None].pow(2)).sum(0).mean().clamp(min=1e-30))

    def _clip(self, rows: Mapping[str, Rows]) -> dict[str, dict[str, Rows]]:
        return clip_rows(rows, self.taps, self.plan, texts=self.together, batch_size=self.batch_size)

    def _rows(self, target: Target, clipped: Mapping[str, Mapping[str, Rows]]) -> Rows:
        group = self.plan[target.tap.slot.name].group if self.clipped else ""
        return clipped[group][target.tap.module].grouped(self.texts)

    def _formed(self, target: Target, clipped: Mapping[str, Mapping[str, Rows]]) -> tuple[Tensor, Tensor]:
        """(R,) inner products and squared norms of a tensor of which some entries are missing, or rounded."""
        gradients = form(target.tap, self._rows(target, clipped))
        if target.kept is not None:
            gradients = gradients * target.kept
        if target.release is not None:
            gradients = self._released(target.tap.slot.name, target.release, gradients)
        return (gradients * target.value).flatten(1).sum(1), gradients.flatten(1).pow(2).sum(1)

    def _gap(self, target: Target, clipped: Mapping[str, Mapping[str, Rows]]) -> Tensor:
        """(R,) sum of absolute differences from one tensor."""
        return (form(target.tap, self._rows(target, clipped)) - target.value).flatten(1).abs().sum(1)

    def _released(self, name: str, plan: Plan, gradients: Tensor) -> Tensor:
        """Round as the client did; the derivative is the identity's (straight-through)."""
        sent = [
            wire.release({name: g}, plan, batch_size=self.batch_size, mask_seed=self.mask_seed)[name] * self.batch_size
            for g in gradients.detach()
        ]
        return gradients + (torch.stack(sent) - gradients).detach()


def _energy(target: Target) -> Tensor:
    """The squared norm of what arrived of a tensor."""
    return (target.value if target.kept is None else target.value * target.kept).pow(2).sum()


def telling(found: list[Target], few: int) -> list[Target]:
    """All tensors that need not be written out, and ``few`` of the pruned or rounded ones.

    Matrices of one role are spread over the blocks. The truth is at zero on any of them, while writing out all
    tensors takes several times as long as the pass through the model that they come from.
    """
    damaged = [target for target in found if target.kept is not None or target.release is not None]
    roles = {role: place for place, role in enumerate(TELLING)}
    matrices = [target for target in damaged if target.tap.matrix and target.tap.slot.role in roles] or damaged
    first = min((roles.get(target.tap.slot.role, 0) for target in matrices), default=0)
    alike = [target for target in matrices if roles.get(target.tap.slot.role, 0) == first]
    chosen = {target.tap.slot.name for target in alike[:: max(1, -(-len(alike) // few))]}
    others = sorted(matrices, key=lambda target: roles.get(target.tap.slot.role, 0))
    for target in others:
        if len(chosen) < few:
            chosen.add(target.tap.slot.name)
    whole = {target.tap.slot.name for target in found} - {target.tap.slot.name for target in damaged}
    return [target for target in found if target.tap.slot.name in whole | chosen]


def targets(seen: Observation, *, aware: bool) -> tuple[list[Target], list[str]]:
    """The tensors of a message that can be compared, and the names of those that cannot.

    Token-embedding tables can't (soft tokens have no row in them), nor can tensors that hold nothing but
    rounding errors (a key's bias: softmax ignores it).
    """
    told, plan = seen.disclosed, seen.disclosed.plan
    taps = find_taps(seen.model, [plan[name].slot for name in seen.message if name in plan])
    largest = max((float(value.float().norm()) for value in seen.message.values()), default=0.0)
    out, ignored = [], []
    for name, value in seen.message.items():
        tap = taps.get(name)
        usable = tap is not None and tap.slot.role != "token_embedding"
        if tap is None or not usable or not float(value.float().norm()) > NEGLIGIBLE * largest:
            ignored.append(name)
            continue
        # the sum over the texts of all clients, as candidates are
        rule, total = plan[name], value.detach().float() * told.batch_size * told.clients
        if told.kind == "delta":  # weights move against the gradient
            total = -total / ((told.learning_rate or 1.0) * told.local_steps)
        kept = (total != 0).float() if aware and rule.keep < 1 else None
        rounded = aware and (rule.bits is not None or bool(rule.release))
        alone = Plan({name: replace(rule, keep=1.0)}, plan.rows, plan.name) if rounded else None
        out.append(Target(tap, total, rule.std(told.batch_size) * math.sqrt(told.clients), kept, alone))
    return out, ignored
