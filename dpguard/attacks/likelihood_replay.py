"""The exact Gaussian log-likelihood of many candidate texts, replaying the policy on each.

Under clip, noise and batch 1 the message is m = f g + s n, so up to a constant a candidate with gradient g has

    log p(m | text) = sum over tensors of (f <m, g> - f² ||g||² / 2) / s²,      f the client's own clip factor.

Only inner products and norms are needed, and both follow from a layer's inputs X and output gradients dY without
forming a weight gradient: <dYᵀ X, M> = <X Mᵀ, dY> and ||dYᵀ X||² = <X Xᵀ, dY dYᵀ> (Goodfellow, arXiv 1510.01799), so
one forward and one backward pass over activations score a whole batch of candidates. (<m, g> is also the derivative
of the candidate's loss along m, which one forward-mode pass gives at the same cost, but without the norms.)
Of tensors of which only some entries arrive, see `likelihood_pruned`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from dpguard.attacks.likelihood_channels import Channel, channels
from dpguard.attacks.likelihood_pruned import embedding_square, gathered, is_sparse, surviving
from dpguard.attacks.observation import Observation
from dpguard.attacks.replay import recording
from dpguard.engine import wire
from dpguard.engine.gradients import per_example_losses
from dpguard.inputs.batch import Batch
from dpguard.policy.layers import Slot

CHUNK = 64
"""Candidates a pass; a sixteenth of it where weight gradients are formed."""


@dataclass(frozen=True)
class Terms:
    """Evidence of C tensors about N candidates, in units of each tensor's variance, clip factors applied.

    Attributes:
        dots: (C, N) <m, g> / s².
        squares: (C, N) ||g||² / s² over the entries that arrived.
    """

    dots: Tensor
    squares: Tensor

    @property
    def loglik(self) -> Tensor:
        """(N,) float64 log-likelihoods in nats; 0 is a text without any gradient."""
        return (self.dots.double() - self.squares.double() / 2).sum(0)

    @property
    def misfit(self) -> Tensor:
        """(N,) standard deviations by which a candidate explains too little of the message along its own gradient.

        Standard normal at the truth: <m - g, g> / (s ||g||).
        """
        squares = self.squares.double().sum(0)
        return (squares - self.dots.double().sum(0)) / squares.clamp(min=1e-30).sqrt()

    @staticmethod
    def join(parts: Sequence[Terms]) -> Terms:
        """Candidates of several passes."""
        return Terms(torch.cat([p.dots for p in parts], 1), torch.cat([p.squares for p in parts], 1))


@dataclass(frozen=True)
class _Use:
    """Inputs (N, T, in), or ids (N, T) of an embedding, and output gradients (N, T, out) of one module."""

    given: Tensor
    signal: Tensor


class Replay:
    """Scores candidates for one message. Works on a private copy of the model.

    Args:
        seen: the message of one text, and what is disclosed.
        dtype: of activations (norms and sums are float32 or wider); bfloat16 for a search, float32 to decide.
        model: a copy made before, to share it.

    Attributes:
        channels: the tensors that are compared.
        ignored: names of tensors on the wire that are not.
        model: the copy, eval mode, frozen.
        chunk: candidates that are compared at once.
    """

    def __init__(
        self, seen: Observation, *, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
    ) -> None:
        told = seen.disclosed
        self.model = frozen_copy(seen.model, dtype) if model is None else model
        self.plan, self.batch_size = told.plan, told.batch_size
        found, ignored = channels(seen)
        modules = dict(self.model.named_modules())
        slots = {name: told.plan[name].slot for name in told.plan}
        self.channels = [c for c in found if _known(slots[c.name], modules)]
        self.ignored = [*ignored, *(c.name for c in found if not _known(slots[c.name], modules))]
        self._values = {c.name: c.value.to(dtype) for c in self.channels}
        pruned = [c for c in self.channels if c.kept is not None]
        cut = [c for c in pruned if isinstance(modules[c.name.rpartition(".")[0]], (nn.Linear, Conv1D))]
        self._places = {c.name: surviving(c.value) for c in cut if is_sparse(c.value)}
        formed = any(c.value.dim() == 2 and c.name not in self._places for c in cut)
        self.chunk = CHUNK // 16 if formed else CHUNK
        grouped = {n for g in self.plan.groups.values() for n in g.names if n in slots and _known(slots[n], modules)}
        self._slots = {name: slot for name, slot in slots.items() if name in grouped | set(self._values)}
        self._complete = {
            key: group for key, group in self.plan.groups.items() if all(n in self._slots for n in group.names)
        }

    @property
    def blocks(self) -> list[int | None]:
        """Block of every channel, None outside the blocks."""
        return [self._slots[c.name].block for c in self.channels]

    def is_token_table(self, channel: Channel) -> bool:
        """Whether the tensor is the token-embedding table, which soft tokens have no row in."""
        return self._slots[channel.name].role == "token_embedding"

    def above_blocks(self, index: int) -> bool:
        """Whether a channel belongs to what comes after the blocks: the pooler or the head."""
        return self._slots[self.channels[index].name].role in {"pooler", "head"}

    def terms(self, batch: Batch, *, only: frozenset[int] | None = None) -> Terms:
        """Evidence about N candidate texts, in chunks; no derivative.

        Args:
            batch: the candidates.
            only: channels (by index) to compare, for a cheaper look: nothing below them is differentiated, and
                norms run over these channels alone.
        """
        parts = []
        for first in range(0, len(batch), size := self.chunk):
            found = self._terms(batch.rows(slice(first, first + size)), None, only)
            parts.append(Terms(found.dots.detach(), found.squares.detach()))
        return Terms.join(parts)

    def differentiable(self, batch: Batch, embeddings: Tensor) -> Terms:
        """The same from token embeddings (N, L, d), with a graph to them; the token table is not compared."""
        return self._terms(batch, embeddings, None)

    def _terms(self, batch: Batch, embeddings: Tensor | None, only: frozenset[int] | None) -> Terms:
        compared = [c for i, c in enumerate(self.channels) if only is None or i in only]
        names = {c.name for c in compared} | (set() if only is not None else set(self._slots))
        if embeddings is not None:
            names = {n for n in names if self._slots[n].role != "token_embedding"}
            compared = [c for c in compared if c.name in names]
        uses = self._record(batch, {n.rpartition(".")[0] for n in names}, embeddings)
        with torch.set_grad_enabled(embeddings is not None):
            grams = _Grams()
            squares = {n: self._square(n, uses[n.rpartition(".")[0]], grams) for n in names}
            factors = self._factors(squares)
            pairs = [self._compare(c, uses[c.name.rpartition(".")[0]], squares[c.name], factors) for c in compared]
        dots, lengths = (torch.stack(side) for side in zip(*pairs, strict=True))
        return Terms(dots, lengths)

    def _record(self, batch: Batch, wanted: set[str], embeddings: Tensor | None) -> dict[str, _Use]:
        """One forward and one backward pass: module -> what it read and what it passes back."""
        modules = {name: module for name, module in self.model.named_modules() if name in wanted}
        with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), recording(modules, start=True) as calls:
            losses = per_example_losses(self.model, batch, embeddings=embeddings)
            flat = [(name, given, output) for name in modules for given, output in calls[name]]
            signals = torch.autograd.grad(
                losses.sum(), [o for _, _, o in flat], create_graph=embeddings is not None, allow_unused=True
            )
        found: dict[str, list[_Use]] = {name: [] for name in modules}
        for (name, given, output), signal in zip(flat, signals, strict=True):
            backward = torch.zeros_like(output) if signal is None else signal
            found[name].append(_Use(*_steps(modules[name], given, backward, keep=embeddings is not None)))
        return {
            name: uses[0]
            if len(uses) == 1
            else _Use(torch.cat([u.given for u in uses], 1), torch.cat([u.signal for u in uses], 1))
            for name, uses in found.items()
        }

    def _square(self, name: str, use: _Use, grams: _Grams) -> Tensor:
        """(N,) squared norms of a parameter's gradients, float32 or wider."""
        module, part = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if part == "bias" or not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            return _wide(self._vector(module, part, use)).flatten(1).pow(2).sum(1)
        if isinstance(module, nn.Embedding):
            same = use.given[:, :, None] == use.given[:, None, :]
            return (grams.of(_real(module, use)) * same).sum((1, 2)).clamp(min=0)
        return (grams.of(use.given) * grams.of(use.signal)).sum((1, 2)).clamp(min=0)

    def _compare(
        self, channel: Channel, use: _Use, square: Tensor, factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(N,) inner products and squared norms of the clipped gradients, over the variance."""
        if channel.kept is None:
            dot = self._dot(channel.name, use)
        else:
            dot, square = self._compare_kept(channel, use)
        factor = factors.get(self.plan[channel.name].group)
        if factor is not None:
            dot, square = dot * factor, square * factor.pow(2)
        if not channel.gain:  # the likeliest gain, which is not negative
            gain = dot.clamp(min=0) / square.clamp(min=1e-30)
            dot, square = dot * gain, square * gain.pow(2)
        return dot / channel.variance, square / channel.variance

    def _compare_kept(self, channel: Channel, use: _Use) -> tuple[Tensor, Tensor]:
        """(N,) inner products and squared norms over the entries that arrived."""
        assert channel.kept is not None
        module = self.model.get_submodule(channel.name.rpartition(".")[0])
        if isinstance(module, nn.Embedding):
            return self._dot(channel.name, use), embedding_square(use.given, _wide(_real(module, use)), channel.kept)
        if channel.name in self._places:
            places, value = self._places[channel.name]
            entries = gathered(*_sides(module, use), places)
        else:
            entries, value = (self._form(channel.name, use) * channel.kept).flatten(1), channel.value.flatten()
        return (entries * value).sum(1), entries.pow(2).sum(1)

    def _dot(self, name: str, use: _Use) -> Tensor:
        """(N,) inner products of a parameter's gradients with the message."""
        owner, _, part = name.rpartition(".")
        module, value = self.model.get_submodule(owner), self._values[name]
        if part == "bias" or not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            return _wide(self._vector(module, part, use) * value).flatten(1).sum(1)
        if isinstance(module, nn.Embedding):
            return _total(value[use.given] * _real(module, use))
        weight = value if isinstance(module, nn.Linear) else value.T  # (out, in)
        if use.given.shape[2] <= use.signal.shape[2]:
            return _total((use.signal @ weight) * use.given)
        return _total((use.given @ weight.T) * use.signal)

    def _vector(self, module: nn.Module, part: str, use: _Use) -> Tensor:
        """(N, size) gradients of a bias or of a norm's scale."""
        return use.signal.sum(1) if part == "bias" else (use.signal * _unscaled(module, use.given)).sum(1)

    def _form(self, name: str, use: _Use) -> Tensor:
        """(N, *shape) gradients of one parameter, float32 or wider; embeddings are never formed."""
        owner, _, part = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if part == "bias" or not isinstance(module, (nn.Linear, Conv1D)):
            return _wide(self._vector(module, part, use))
        left, right = _sides(module, use)
        return left.transpose(1, 2) @ right

    def _factors(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clip group -> (N,) what the client multiplied each candidate's gradient with."""
        out = {}
        for key, group in self._complete.items():
            members = [squares[n] for n in group.names if n in squares]
            if members:
                norms = torch.stack(members).sum(0).clamp(min=1e-30).sqrt()
                scale = self.batch_size if group.unit == "update" else 1
                out[key] = wire.clip_factors(norms / scale, group.clip, group.mode)
        return out


class _Grams:
    """(N, T, T) Gram matrices, float32 or wider, each formed once: query, key and value share their input.

    From bfloat16 activations they are formed in bfloat16 (many times faster): the rounding of their entries is as
    large as the activations' own, and averages out in the sums.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor) -> Tensor:
        if id(x) not in self._known:
            self._known[id(x)] = (x, _wide(x @ x.transpose(1, 2)))
        return self._known[id(x)][1]


def _sides(module: nn.Module, use: _Use) -> tuple[Tensor, Tensor]:
    """(N, T, rows) and (N, T, columns) whose product over T is a linear weight's gradient, float32 or wider."""
    signal, given = _wide(use.signal), _wide(use.given)
    return (signal, given) if isinstance(module, nn.Linear) else (given, signal)


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode whose parameters want no gradient, so that autograd forms none."""
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


def _known(slot: Slot, modules: Mapping[str, nn.Module]) -> bool:
    owner, _, part = slot.name.rpartition(".")
    module = modules.get(owner)
    if isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm)):
        return part in {"weight", "bias"}
    return part == "weight" and (isinstance(module, nn.Embedding) or type(module).__name__.endswith("RMSNorm"))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _total(x: Tensor) -> Tensor:
    """(N,) sums over all but the first dimension, float32 or wider."""
    return x.sum((1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


def _steps(module: nn.Module, given: Tensor, signal: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """(N, T, ...) inputs and output gradients, detached unless ``keep``; modules may see one vector a text."""
    if isinstance(module, nn.Embedding):
        given = given.reshape(given.shape[0], -1)
        if given.shape[0] != signal.shape[0]:
            given = given.expand(signal.shape[0], -1)
    elif given.dim() == 2:
        given = given.unsqueeze(1)
    signal = signal.unsqueeze(1) if signal.dim() == 2 else signal
    return (given, signal) if keep else (given.detach(), signal.detach())


def _real(module: nn.Embedding, use: _Use) -> Tensor:
    """Output gradients without those of the padding row, which autograd leaves at zero."""
    if module.padding_idx is None:
        return use.signal
    return use.signal.masked_fill((use.given == module.padding_idx)[:, :, None], 0.0)


def _unscaled(module: nn.Module, given: Tensor) -> Tensor:
    """What a norm multiplies with its scale."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(given, module.normalized_shape, eps=module.eps)
    weight: Tensor = module.weight  # type: ignore[assignment]
    likes = torch.ones_like(weight), torch.zeros_like(weight)
    one, zero = (functional_call(module, {"weight": like}, (given,)) for like in likes)
    difference: Tensor = one - zero
    return difference
