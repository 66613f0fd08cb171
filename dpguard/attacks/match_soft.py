"""Which tokens a damaged gradient still shows: soft spans of pruned, rounded and dropout gradients.

A linear layer's gradient has the span of the layer's inputs as its row space. Pruning and rounding add an error of
full rank to it, so that no span is left to test exactly; but the error is spread over all directions and the inputs'
directions stand out of it (a Wiener filter on the spectrum says how far each does). The first block's attention reads
embeddings that know no context, so that every (token, position) can be held against these directions at once: the
smaller the share of a state that lies outside, measured in directions in which tokens differ, the likelier the token.
Dropout leaves the row space exact, but of states with some entries set to zero: they are found together
with the entries that were dropped (`kept_entries`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpguard.attacks.observation import Observation
from dpguard.attacks.span_guess import Guess
from dpguard.attacks.span_picture import Album, View
from dpguard.attacks.span_sites import Probe, Site, sites_of
from dpguard.attacks.vocabulary import Frame, allowed_tokens, frame_of
from dpguard.engine.gradients import forward_arguments, running_as
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import slots

CONTEXT_FREE = ("query", "key", "value", "qkv")
DEEPER = ("value", "qkv", "query", "mlp_in")
"""Roles of deeper blocks whose inputs a linear picture predicts well."""
MOST_SITES = 3
FINALISTS = 300
"""Tokens at each position that get the finer test."""
RIDGE = 0.3
"""Variance added to that of tokens along every direction, relative to the mean: what the spectrum's error blurs."""
FLOOR = 1e-6
"""Error of float32 sums relative to the largest singular value."""
HEAD = 16
"""The strongest sixteenth of the directions is left out when the error is measured."""
MARGIN = 2.0
"""Error of pruning and rounding is not independent from entry to entry: its edge lies above white noise's."""
SAMPLE = 512
LENGTHS = 5
"""Lengths that are handed on."""
LONGEST = 64
"""Positions looked at when the length is unknown."""
CHUNK_TOKENS = 1024
NEVER = 12.0
SURE = math.log(1e-6)
"""Log misfit of a state that lies in the span to float32 precision."""
SETTLED = math.log(1e-3)
PASSES = 12
SOFTEST, SHARPER = 0.3, 0.6
"""Deviation, relative to a state's mean entry, at which an entry starts to count as an outlier; its factor a pass."""
RIDGE_LEAST = 1e-12


@dataclass(frozen=True)
class Lists:
    """What the message says about tokens and length before any search.

    Attributes:
        guess: table of all tokens by position; see `span_guess.Guess`.
        lengths: token counts with special tokens, likeliest first.
    """

    guess: Guess
    lengths: tuple[int, ...]

    @property
    def settled(self) -> frozenset[int]:
        """Positions at which some token leaves nothing unexplained but a few entries next to zero."""
        return frozenset((self.guess.misfit.min(dim=0).values < SETTLED).nonzero().flatten().tolist())

    def upto(self, length: int) -> Guess:
        """The table for a text of ``length`` tokens."""
        return Guess(self.guess.misfit[:, :length], self.guess.tokens)


@dataclass(frozen=True)
class Directions:
    """Row space of a damaged gradient.

    Attributes:
        basis: (inputs, inputs) orthonormal rows, strongest first, float64.
        weights: (inputs,) from 1, certainly the inputs' own, to 0, no more than error.
    """

    basis: Tensor
    weights: Tensor

    @property
    def visible(self) -> int:
        """How many directions stand out of the error."""
        return int((self.weights > 0.5).sum())

    def outside(self, states: Tensor) -> Tensor:
        """(...,) share of each state's energy that the directions do not explain."""
        rows = self.basis[self.weights > 0] * self.weights[self.weights > 0].sqrt()[:, None]
        inside = (states @ rows.T.to(states.dtype)).pow(2).sum(-1)
        share: Tensor = 1 - inside / states.pow(2).sum(-1).clamp_min(1e-30)
        return share.clamp_min(1e-9)

    def root(self) -> Tensor:
        """(inputs, inputs) square root of the projection on what is outside."""
        return self.basis.T @ ((1 - self.weights).clamp_min(0).sqrt()[:, None] * self.basis)


def directions(gradients: Sequence[Tensor]) -> Directions | None:
    """Common row space of several gradients (outputs, inputs) of layers that read the same states.

    Each is measured in units of its error, whose size follows from the part of the spectrum beyond the first
    `HEAD` of the directions; float32 rounding is the least error there is.
    None when nothing stands out.
    """
    inputs = gradients[0].shape[1]
    energy, rows = torch.zeros((inputs, inputs), dtype=torch.float64, device=gradients[0].device), 0
    for gradient in gradients:
        if not gradient.any() or not gradient.isfinite().all():
            continue
        gram = gradient.T @ gradient
        values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
        floor = FLOOR**2 * float(values[0]) / inputs
        head = inputs // HEAD
        tail = float(values[head:].sum()) / (gradient.shape[0] * (inputs - head))
        clean = float(values[inputs // 2]) / inputs <= floor  # a long text may have more directions than the head
        unit = floor if clean else max(tail, floor)
        energy += gram / unit
        rows += gradient.shape[0]
    if not rows:
        return None
    values, vectors = torch.linalg.eigh(energy)
    values, vectors = values.flip(0), vectors.flip(1)
    edge = MARGIN * (math.sqrt(rows) + math.sqrt(inputs)) ** 2
    weights = (1 - edge / values.clamp_min(1e-30)).clamp(0, 1)
    return Directions(vectors.T.contiguous(), weights) if bool((weights > 0.5).any()) else None


def likely(seen: Observation) -> Lists | None:
    """Tokens by position, and lengths, for a message of one text; None when no shared weight shows any.

    Weights of the first block's attention decide alone where they are shared; else up to `MOST_SITES` deeper ones
    through linear pictures. The model must be in eval mode with its dropout rates as they are (not `running_as`).
    """
    sites = sites_of(seen.model)
    shared = [s for s in sites.all if s.name in seen.message and s.block < sites.last_block and s.adapter != "B"]
    probe, frame = Probe(seen.model), frame_of(seen.disclosed.tokenizer)
    first = [s for s in shared if s.block == 0 and s.role in CONTEXT_FREE]
    if first:
        common = directions([s.oriented(seen.message[s.name]) for s in first])
        return None if common is None else _Embeddings(seen, probe, frame, first[0].layer, common).lists()
    return _deeper(seen, probe, frame, [s for s in shared if s.role in DEEPER])


def _words(seen: Observation, probe: Probe) -> Tensor:
    allowed = allowed_tokens(seen.disclosed.tokenizer, len(probe.embedding), unknown=True)
    return allowed.nonzero().flatten().to(probe.device)


class _Embeddings:
    """Every (token, position) against the directions of the first block's attention inputs.

    Args:
        seen: the message.
        probe: the model.
        frame: special tokens around a text.
        layer: one of the layers that read the states.
        common: their directions.
    """

    def __init__(self, seen: Observation, probe: Probe, frame: Frame, layer: nn.Module, common: Directions) -> None:
        self.seen, self.probe, self.frame, self.layer, self.common = seen, probe, frame, layer, common
        self.words = _words(seen, probe)
        sample = self.words[torch.linspace(0, len(self.words) - 1, min(SAMPLE, len(self.words))).long()]
        most = min(LONGEST, probe.family.max_tokens(probe.config), seen.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        told = seen.disclosed.lengths
        self.width = told[0] if told else most
        states = self.states(sample, self.width).double()
        self.spread = torch.einsum("npd,npe->de", states, states) / (len(sample) * self.width)
        self.sample = sample
        self.rate = self._rate() if seen.disclosed.mode == "train" else 0.0
        root, size = common.root(), float(self.spread.trace()) / len(self.spread)
        identity = RIDGE * size * torch.eye(len(root), dtype=root.dtype, device=root.device)
        self.numerator = root @ torch.linalg.inv(root @ self.spread @ root + identity) @ root
        self.denominator = torch.linalg.inv(self.spread + identity)

    def states(self, tokens: Tensor, width: int) -> Tensor:
        """(n, width, d) state of each token at each position; embeddings know no context."""
        return self.probe.states(self.layer, tokens[:, None].expand(-1, width))

    def lists(self) -> Lists | None:
        """The tables; at most the likeliest lengths are looked at."""
        lengths = self.seen.disclosed.lengths or self.lengths()
        if not lengths:
            return None
        width, count = max(lengths), min(FINALISTS, len(self.words))
        scored = self.probe.scored
        plain = torch.cat(
            [self.common.outside(self.states(part, width)) for part in self.words.split(CHUNK_TOKENS)]  # type: ignore[no-untyped-call]
        )
        self.probe.scored = scored
        misfit = plain.log() + NEVER
        for position, near in enumerate(plain.topk(count, dim=0, largest=False).indices.T):
            misfit[near, position] = self.finer(self.at(self.words[near], position))
        return Lists(Guess(misfit, self.words), tuple(lengths))

    def at(self, tokens: Tensor, position: int) -> Tensor:
        """(n, d) float64 states of tokens at one position."""
        return self.states(tokens, position + 1)[:, position].double()

    def finer(self, states: Tensor) -> Tensor:
        """(n,) log misfit of states: dropped entries found, or the share outside in units of what tokens differ by."""
        if self.rate:
            return (
                kept_entries(states, self.common.basis[: self.common.visible], self.rate).clamp_min(1e-9).log().float()
            )
        broken = ((states @ self.numerator) * states).sum(1)
        whole = ((states @ self.denominator) * states).sum(1)
        share: Tensor = broken / whole.clamp_min(1e-30)
        return share.clamp_min(1e-9).log().float()

    def lengths(self) -> list[int]:
        """Lengths at which the text's last special token stands out, or where positions end."""
        size = self.frame.size
        rank = self.common.visible
        if not self.frame.suffix:
            first = size + 1
            return [n for n in (rank, rank + 1, rank - 1, rank + 2) if first <= n <= self.width]
        closing = torch.tensor([self.frame.suffix[-1]], device=self.probe.device)
        states = self.states(torch.cat([closing, self.sample]), self.width).double()
        misfit = self.finer(states[0])
        sure = [place for place in range(size, self.width) if float(misfit[place]) < SURE]
        if len(sure) == 1:
            return [sure[0] + 1]
        if self.rate:
            return [place + 1 for place in misfit.argsort().tolist() if place >= size][:LENGTHS]
        share = self.common.outside(states).log()
        against = (share[0] - share[1:].mean(dim=0)) / share[1:].std(dim=0)
        place = share[0].argsort().argsort() + against.argsort().argsort()
        return [n + 1 for n in place.argsort(stable=True).tolist() if n >= size][:LENGTHS]

    def _rate(self) -> float:
        """Dropout rate of the states, when dropout is the last thing that happened to them; else 0."""
        ids = self.sample[:8][None]
        still = self.probe.states(self.layer, ids)[0]
        with torch.random.fork_rng(devices=[]), running_as(self.seen.model, "train"):
            torch.manual_seed(0)
            moved = _entering(self.seen.model, self.layer, ids)
        kept = moved != 0
        ratio = (moved / still)[kept & (still != 0)]
        rate = 1 - float(kept.float().mean())
        single = len(ratio) > 0 and float((ratio - ratio.median()).abs().max()) < 1e-3 * float(ratio.median().abs())
        return rate if single and 0 < rate < 0.9 else 0.0


def _entering(model: nn.Module, layer: nn.Module, ids: Tensor) -> Tensor:
    """(L, d) what enters a layer in the model's present mode."""
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, arguments: kept.append(arguments[0].detach()))
    try:
        with torch.no_grad():
            model(**forward_arguments(model, Batch(ids, torch.ones_like(ids), ids[:, 0])))
    finally:
        handle.remove()
    return kept[0][0]


def kept_entries(states: Tensor, basis: Tensor, rate: float) -> Tensor:
    """(n,) share of each state outside a span, after dropping the entries that the span says were dropped.

    If x with some entries at zero lies in the span, then some vector of the span equals x at all the other entries: a
    linear regression with a few outliers, which least absolute deviations settle exactly (iteratively reweighted
    least squares, the weights sharper every time), because a span of few directions can't follow that many entries
    by chance. More than twice the expected number of dropped entries is not believed.

    Args:
        states: (n, inputs) float64.
        basis: (r, inputs) orthonormal rows.
        rate: dropout rate.
    """
    size = states.abs().mean(1, keepdim=True).clamp_min(1e-30)
    ridge = RIDGE_LEAST * torch.eye(len(basis), dtype=states.dtype, device=states.device)
    weights, there = torch.ones_like(states), states
    for count in range(PASSES):
        gram = torch.einsum("rd,nd,sd->nrs", basis, weights, basis) + ridge
        there = torch.linalg.solve(gram, (states * weights) @ basis.T) @ basis
        weights = 1 / ((there - states).abs() + size * SOFTEST * SHARPER**count)
        weights = weights / weights.amax(1, keepdim=True)
    kept = there * states.sign() > 0.5 * states.abs()
    some = states * kept
    residual = 1 - ((some @ basis.T).pow(2).sum(1) / some.pow(2).sum(1).clamp_min(1e-30))
    lost = 1 - kept.double().mean(1)
    return torch.where(lost < 2 * rate + 0.05, residual.clamp_min(0), residual.clamp_min(0) + lost)


def _deeper(seen: Observation, probe: Probe, frame: Frame, sites: list[Site]) -> Lists | None:
    """Tables of deeper weights through linear pictures, added up."""
    words, told = _words(seen, probe), seen.disclosed.lengths
    public = [seen.disclosed.tokenizer(text)["input_ids"] for text in seen.disclosed.public_texts[:400]]
    album = Album(probe, words, frame, public, _positions(probe))
    total, count, lengths = None, 0, list(told or ())
    for site in sites:
        common = directions([site.oriented(seen.message[site.name])])
        if common is None or common.visible <= frame.size:
            continue
        rank = common.visible
        lengths = lengths or [n for n in (rank, rank + 1, rank + 2, rank - 1) if n > frame.size]
        width = min(max(lengths), probe.family.max_tokens(probe.config))
        picture = album.picture(site.name, site.layer, width)
        nothing = torch.zeros(len(common.basis), dtype=torch.float64, device=probe.device)
        view = View(common.root(), nothing, torch.eye(len(nothing), dtype=torch.float64), nothing)
        table = picture.table(view, probe.embedding[words], probe.positions(width)).clamp_min(1e-9).log()
        total, count = table if total is None else total + table, count + 1
        if count == MOST_SITES:
            break
    return None if total is None else Lists(Guess(total / count, words), tuple(lengths))


def _positions(probe: Probe) -> Tensor:
    """(P, p) position embeddings; p = 0 for a model that has none."""
    for slot in slots(probe.model):
        if slot.role == "position_embedding":
            return probe.model.get_parameter(slot.name).detach()
    return torch.zeros((int(probe.config.max_position_embeddings), 0), device=probe.device)
