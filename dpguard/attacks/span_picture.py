"""A linear picture of a layer's inputs: what a token at a position looks like there, whatever surrounds it.

Deep states are mostly token plus position plus context. A ridge regression on texts that anybody can make
predicts the first two and measures the third as a covariance. A token at a position is then tested against a
span by generalised least squares: the part of the predicted state outside the span, in units of what context
can explain, relative to the whole state in the same units. No optimisation, no message needed to fit it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpguard.attacks.span_sites import Probe
from dpguard.attacks.vocabulary import Frame

RIDGE = 1e-3
TOKENS_PER_FEATURE = 10
MOST_TOKENS = 8000


@dataclass(frozen=True)
class View:
    """Linear conditions A h + a = 0 that every true state h of a layer meets.

    Attributes:
        matrix: (k, inputs) A, float64.
        offset: (k,) a.
        whole: (w, inputs) the same map before what the span allows was taken out, for the relative size.
        whole_offset: (w,).
    """

    matrix: Tensor
    offset: Tensor
    whole: Tensor
    whole_offset: Tensor


@dataclass(frozen=True)
class Picture:
    """Regression of a layer's input on token embedding, position embedding and a constant.

    Attributes:
        weights: (features, inputs) float64.
        scatter: (inputs, inputs) covariance of what context adds.
        opening: (inputs,) mean state of the first token.
        positions: (P, p) position embeddings, p = 0 for models without.
    """

    weights: Tensor
    scatter: Tensor
    opening: Tensor
    positions: Tensor

    def constant(self, rows: Tensor) -> Tensor:
        """(n, inputs) contribution of positions (rows of the position table) and the constant."""
        width = self.positions.shape[1]
        return self.positions[rows].double() @ self.weights[-1 - width : -1] + self.weights[-1]

    def table(self, view: View, embedding: Tensor, rows: Tensor) -> Tensor:
        """(tokens, positions) share of a token's whitened state that breaks the conditions; small = likely.

        Args:
            view: the conditions.
            embedding: (tokens, d) token embeddings.
            rows: (positions,) rows of the position table.
        """
        broken = self._energy(view.matrix, view.offset, embedding, rows)
        return broken / self._energy(view.whole, view.whole_offset, embedding, rows).clamp_min(1e-12)

    def _energy(self, matrix: Tensor, offset: Tensor, embedding: Tensor, rows: Tensor) -> Tensor:
        spread = matrix @ self.scatter @ matrix.T
        spread.diagonal().add_(RIDGE * spread.diagonal().mean() + 1e-12)
        whitener = torch.linalg.cholesky(spread)
        map_ = torch.linalg.solve_triangular(whitener, matrix @ self.weights.T, upper=False)
        shift = torch.linalg.solve_triangular(whitener, offset[:, None], upper=False)
        width = embedding.shape[1]
        there = torch.linalg.solve_triangular(whitener, matrix @ self.constant(rows).T, upper=False) + shift
        tokens = embedding @ map_[:, :width].T.to(embedding.dtype)
        there = there.to(embedding.dtype)
        squares: Tensor = tokens.pow(2).sum(1)[:, None] + 2 * (tokens @ there) + there.pow(2).sum(0)
        return squares


def zipf_texts(count: int, longest: int, tokens: Tensor, frame: Frame, generator: torch.Generator) -> list[list[int]]:
    """Texts of random tokens, frequent ones more often (vocabularies are sorted by frequency or merge order).

    Args:
        count: how many.
        longest: most tokens, special ones included; lengths are uniform from a quarter of it.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        generator: source of the draws.
    """
    out = []
    low, high = max(1, longest // 4 - frame.size), max(2, longest - frame.size)
    for length in torch.randint(low, high + 1, (count,), generator=generator).tolist():
        rank = torch.rand(length, generator=generator).mul(math.log(len(tokens))).exp().long() - 1
        out.append(frame.wrap(tokens[rank.clamp(0, len(tokens) - 1)].tolist()))
    return out


def fit(
    probe: Probe, layer: nn.Module, texts: Sequence[Sequence[int]], table: Tensor, prior: Picture | None = None
) -> Picture:
    """Fit a picture to texts.

    Args:
        probe: the model.
        layer: the layer whose inputs are pictured.
        texts: token ids, any lengths.
        table: (P, p) position embeddings, possibly of width 0.
        prior: a picture to shrink towards instead of zero (texts of one length and kind refine it).
    """
    lengths: dict[int, list[Sequence[int]]] = {}
    for text in texts:
        lengths.setdefault(len(text), []).append(text)
    features, states, openings = [], [], []
    for length, group in sorted(lengths.items()):
        ids = torch.tensor(group, device=probe.device)
        found = probe.states(layer, ids)
        where = table[probe.positions(length)].expand(len(ids), -1, -1)
        one = torch.ones((len(ids), length, 1), device=probe.device)
        features.append(torch.cat([probe.embedding[ids], where, one], dim=2)[:, 1:].flatten(0, 1))
        states.append(found[:, 1:].flatten(0, 1))
        openings.append(found[:, 0])
    x, y = torch.cat(features).double(), torch.cat(states).double()
    start = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    if prior is not None:
        start = prior.weights
    missing = y - x @ start
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * len(x))
    weights = start + torch.linalg.solve(gram, x.T @ missing)
    left = y - x @ weights
    scatter = left.T @ left / len(left)
    if prior is not None:
        scatter = 0.5 * (scatter + prior.scatter)
    return Picture(weights, scatter, torch.cat(openings).mean(0).double(), table)


class Album:
    """Pictures by layer and length, kept as long as the model's weights stay what they were.

    They are made of public knowledge with a fixed seed, so keeping them changes no answer.
    """

    _kept: ClassVar[WeakKeyDictionary[nn.Module, dict[Any, Picture]]] = WeakKeyDictionary()

    def __init__(self, probe: Probe, tokens: Tensor, frame: Frame, public: Sequence[Sequence[int]], table: Tensor):
        self.probe, self.tokens, self.frame, self.public, self.table = probe, tokens, frame, public, table
        with torch.no_grad():
            marks = [float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in probe.model.parameters()]
        known = (tuple(map(tuple, public)), tuple(tokens.tolist()), frame)
        self.state = (tuple(marks), str(probe.device), hash(known))

    def picture(self, name: str, layer: nn.Module, length: int) -> Picture:
        """The picture of a layer for texts of about ``length`` tokens."""
        longest = min(max(16, 1 << (length - 1).bit_length()), self.probe.family.max_tokens(self.probe.config))
        pages = self._kept.setdefault(self.probe.model, {})
        key = (name, longest, self.state)
        if key not in pages:
            if any(old[2] != self.state for old in pages):
                pages.clear()
            before = self.probe.scored
            pages[key] = fit(self.probe, layer, self._texts(longest), self.table)
            self.probe.scored = before
        return pages[key]

    def _texts(self, longest: int) -> list[list[int]]:
        features = self.probe.embedding.shape[1] + self.table.shape[1] + 1
        wanted = min(MOST_TOKENS, TOKENS_PER_FEATURE * features)
        texts, used = [], 0
        for text in self.public:
            if longest // 4 <= len(text) <= longest and used < wanted // 2:
                texts.append(list(text))
                used += len(text)
        generator = torch.Generator().manual_seed(longest)
        count = math.ceil((wanted - used) / (0.625 * longest))
        return texts + zipf_texts(count, longest, self.tokens.cpu(), self.frame, generator)
