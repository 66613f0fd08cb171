"""The score that guides a search: a weighted, scale-free form of the likelihood, in units of a public text's energy.

At low noise the exact likelihood is ruled by the few tensors with the largest gradients, and a search on it gets
stuck; weighting each tensor by its public signal energy against its noise (a Wiener filter) spreads the evidence.
When the noise is large the weights are equal and, under an active clip, the score is the likelihood. The last steps
of a search are guided by the likelihood itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpguard.attacks.likelihood_replay import Replay, Terms
from dpguard.attacks.likelihood_texts import batch_of, score

PUBLIC = 32
"""Public texts that the weights are measured on."""
FREEDOM = 0.8
"""Directions of noise that candidates' gradients can follow in one layer, in units of the model's width."""
LEAST = 1e-3
MISFIT = 2.5
"""Standard deviations that a text may leave over to end a search."""
ROUNDING = 0.005
"""Relative error of a text's score in bfloat16."""


class Guide:
    """Scores rows of one length under one label.

    Args:
        replay: the message.
        label: class index.
        padding: id of the padding token.
        public: public texts of about that length, as token ids.
        plain: the exact log-likelihood instead, in the same units.

    Attributes:
        energy: ||g||² / s² of a public text, in all.
        nats: what one nat of log-prior is worth in units of the score.
    """

    def __init__(
        self, replay: Replay, label: int, padding: int, public: Sequence[Sequence[int]], *, plain: bool = False
    ) -> None:
        self.replay, self.label, self.padding, self.plain = replay, label, padding, plain
        self.table: Tensor = replay.model.get_input_embeddings().weight  # type: ignore[operator]
        squares = score(replay, list(public)[:PUBLIC], label, padding).squares
        self.energy = max(float(squares.sum(0).mean()), 1e-30)
        share = (squares / squares.sum(0).clamp(min=1e-30)).mean(1)
        # weight and bias of a layer together: a bias alone has too few entries to be told from noise
        owners = [c.name.rpartition(".")[0] for c in replay.channels]
        layer = torch.tensor([[a == b for b in owners] for a in owners]).to(share) @ share
        weights = torch.ones_like(layer) if plain else 1 / (layer + FREEDOM * self.table.shape[1] / self.energy + LEAST)
        self.weights = weights / (weights * share).sum()
        self.nats = float((self.weights.square() * share).sum()) / self.energy
        self.upper = self._upper()

    def full(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The score of every row: about 1 at the truth, 0 for an unrelated gradient."""
        found = self.replay.terms(batch_of(rows, self.label, self.padding))
        return self._combine(found, self.weights).tolist()

    def screen(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(N,) a cheaper look through the upper blocks alone; the full score where it would not be cheaper."""
        found = self.replay.terms(batch_of(rows, self.label, self.padding), only=self.upper)
        return self._combine(found, self.weights if self.upper is None else None)

    def slopes(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(N, T, d) float32 derivatives of the score with respect to token embeddings."""
        size = self.replay.chunk
        return torch.cat([self._slopes(rows[first : first + size]) for first in range(0, len(rows), size)])

    def _slopes(self, rows: Sequence[Sequence[int]]) -> Tensor:
        batch = batch_of(rows, self.label, self.padding)
        start = self.table[batch.input_ids].detach().clone().requires_grad_()
        found = self.replay.differentiable(batch, start)
        weights = self.weights
        if len(found.dots) != len(weights):  # without the token table
            weights = weights[[i for i, c in enumerate(self.replay.channels) if not self.replay.is_token_table(c)]]
        (slope,) = torch.autograd.grad(self._combine(found, weights).sum(), start)
        return slope.float()

    def explains(self, row: Sequence[int]) -> bool:
        """Whether a text leaves no more of the message over than the noise, and rounding, would."""
        terms = score(self.replay, [row], self.label, self.padding)
        rounding = ROUNDING * float(terms.squares.sum()) ** 0.5
        return abs(float(terms.misfit[0])) <= MISFIT + (rounding if self.table.dtype is torch.bfloat16 else 0.0)

    def _combine(self, terms: Terms, weights: Tensor | None) -> Tensor:
        dots, squares = terms.dots, terms.squares
        if self.plain and weights is not None:
            return (dots.sum(0) - squares.sum(0) / 2) / self.energy + 0.5
        if weights is not None:
            dots, squares = dots * weights[:, None], squares * weights[:, None]
        return dots.sum(0) / (squares.sum(0).clamp(min=1e-30) * self.energy).sqrt()

    def _upper(self) -> frozenset[int] | None:
        """Channels above two thirds of the blocks, when there are enough of both."""
        blocks = self.replay.blocks
        inside = [b for b in blocks if b is not None]
        if not inside or max(inside) < 2:
            return None
        first = 2 * (max(inside) + 1) // 3
        upper = frozenset(
            i
            for i, b in enumerate(blocks)
            if (b is not None and b >= first) or (b is None and self.replay.above_blocks(i))
        )
        return upper if min(inside) < first and any(b is not None and b >= first for b in inside) else None
