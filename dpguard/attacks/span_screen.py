"""Which tokens may follow a prefix: a linear map from a token's embedding to its state, fitted at that prefix.

The states of a few hundred tokens after the prefix are computed; ridge regression predicts those of all others,
drawn towards the map that earlier prefixes had in common. A token is then ranked by what its predicted state has
outside the span, in units of the prediction's own errors there. One matrix product ranks the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.span_rank import Span

RIDGE = 300.0
"""How many examples the earlier prefixes' map is worth."""
FLOOR = 1e-2
"""Least variance of a direction's error, relative to the mean direction's."""
MEMORY = 0.9
"""What earlier prefixes count for after another one has been seen."""


class Screen:
    """Ranks the tokens that may follow a prefix; learns from every prefix.

    Args:
        span: what true states lie in.
        embedding: (n, d) embeddings of the tokens that a text can contain.
    """

    def __init__(self, span: Span, embedding: Tensor) -> None:
        wide = embedding.float() - embedding.float().mean(0)
        self.features = wide / wide.std().clamp_min(1e-12)
        self.outside = span.complement()
        width = self.features.shape[1]
        options = {"dtype": torch.float64, "device": embedding.device}
        self.gram = torch.zeros((width, width), **options)  # type: ignore[call-overload]
        self.cross = torch.zeros((width, span.inputs), **options)  # type: ignore[call-overload]
        self.scatter = torch.zeros((span.inputs, span.inputs), **options)  # type: ignore[call-overload]
        self.seen = 0

    def rank(self, rows: Tensor, states: Tensor) -> Tensor:
        """(n,) row numbers of the embeddings, those first whose token is likeliest to follow.

        Args:
            rows: (k,) row numbers of tokens whose states at this prefix are known.
            states: (k, inputs) float64.
        """
        weights, constant = self._fit(self.features[rows].double(), states)
        spread = self.outside @ self.scatter @ self.outside.T
        spread.diagonal().add_(FLOOR * spread.diagonal().mean() + 1e-12)
        map_ = self.outside @ torch.cat([weights, constant[None]]).T
        map_ = torch.linalg.solve_triangular(torch.linalg.cholesky(spread), map_, upper=False).float()
        misfit: Tensor = (self.features @ map_[:, :-1].T + map_[:, -1]).pow(2).sum(1)
        return misfit.argsort()

    def _fit(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The map at this prefix and its constant; what it teaches about others is kept."""
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram, cross = x.T @ x, x.T @ y
        prior = _solve(self.gram, self.cross) if self.seen else torch.zeros_like(self.cross)
        weights = prior + _solve(gram, cross - gram @ prior)
        left = y - x @ (prior if self.seen else weights)
        self.gram, self.cross = MEMORY * self.gram + gram, MEMORY * self.cross + cross
        self.scatter = MEMORY * self.scatter + left.T @ left
        self.seen += len(x)
        return weights, mean_y - mean_x @ weights


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    held = gram.clone()
    held.diagonal().add_(RIDGE)
    found: Tensor = torch.linalg.solve(held, cross)
    return found
