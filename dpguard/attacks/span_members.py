"""A text from one of its rows: whom the row's attention mixed is a linear problem with one answer.

A row's mixture in head h is a weighted mean of its text's values, o = sum(e_j v_j) / sum(e_j), where the weight
e_j = exp(q k_j) of a candidate j depends on the row and the candidate alone. So sum over members of
e_j (v_j - o) = 0 for every head: as many linear equations as a state has numbers, for indicators that are 0 or 1.
Non-negative least squares finds them from a pool many times larger than the number of equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import nnls
from torch import Tensor

from dpguard.attacks.span_block import FirstBlock
from dpguard.attacks.span_pool import Pool
from dpguard.attacks.vocabulary import Frame

PASSES = 2
"""Solutions with the heads' weights as the one before them implies."""
MEMBER = 0.3
"""Share of a full member that a candidate needs to be taken for one."""
LENGTH = 16
"""Tokens that a text is thought to have before anything is known."""


@dataclass(frozen=True)
class Members:
    """How much of a member each candidate of a context is.

    Attributes:
        share: (m,) from 0 (not in the row's text) to about 1.
        tokens: (m,) token ids.
        places: (m,) positions.
    """

    share: Tensor
    tokens: Tensor
    places: Tensor

    def text(self, frame: Frame) -> list[int] | None:
        """The token ids with the largest share at every position, or None when a position has none."""
        length = self._length(frame)
        if length <= frame.size:
            return None
        words = frame.wrap([-1] * (length - frame.size))
        for place, token in enumerate(words):
            if token < 0:
                here = (self.places == place).nonzero().flatten()
                if not len(here) or not self.share[here].any():
                    return None
                words[place] = int(self.tokens[here[self.share[here].argmax()]])
        return words

    def _length(self, frame: Frame) -> int:
        """Tokens of the text: up to the closing special token with the largest share, or the last member."""
        if frame.suffix:
            closing = self.share * (self.tokens == frame.suffix[-1]) * (self.places >= frame.size - 1)
            best = int(closing.argmax())
            return int(self.places[best]) + 1 if float(closing[best]) > 0 else 0
        return int(self.places[self.share > MEMBER].max()) + 1

    def alternatives(self, length: int, count: int) -> Tensor:
        """(length, count) token ids by share at each position, repeated where there are fewer."""
        rows = []
        for place in range(length):
            here = (self.places == place).nonzero().flatten()
            best = self.tokens[here[self.share[here].argsort(descending=True)]][:count]
            rows.append(best.repeat(count)[:count] if len(best) else self.tokens.new_zeros(count))
        return torch.stack(rows)


def members(block: FirstBlock, context: Pool, row: Tensor, mixture: Tensor, known: list[int]) -> Members:
    """Solve for the text of one row.

    Args:
        block: in float64.
        context: candidates that the text may consist of.
        row: (d,) the row's embedding.
        mixture: (d,) what its attention mixed.
        known: indices into the context that are members for sure: the row itself, the opening token.
    """
    gaps = block.split(block.value(context.rows)) - block.split(mixture[None])
    logs = block.weights(row[None], context.rows)[0].T
    logs = logs - logs[known].mean(0)
    weight = logs.clamp(max=50.0).exp()
    scale = weight[known].sum(0) + weight.clamp(max=20.0).mean(0) * LENGTH
    free = torch.ones(len(context), dtype=torch.bool, device=row.device)
    free[known] = False
    share = torch.zeros(len(context), dtype=torch.float64, device=row.device)
    for _ in range(PASSES):
        columns = ((weight / scale)[:, :, None] * gaps).flatten(1).T
        target = -columns[:, known].sum(1)
        solved = nnls(columns[:, free].cpu().numpy(), target.cpu().numpy(), maxiter=30 * len(context))[0]
        share[free] = torch.as_tensor(solved, device=row.device)
        share[known] = 1.0
        scale = (weight * share[:, None]).sum(0)
    return Members(share, context.tokens, context.places)
