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
JOIN, GENERATIONS = 96, 40
"""Columns that join a small problem at a time, and how often."""
PRECISION = 1e-9
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


class MemberSolver:
    """Finds the texts of rows.

    Args:
        block: in float64.
        pool: candidates that texts may consist of.
    """

    def __init__(self, block: FirstBlock, pool: Pool) -> None:
        self.block, self.pool = block, pool
        self.keys, self.values = block.key(pool.rows), block.split(block.value(pool.rows))

    def solve(self, mixture: Tensor, known: list[int], context: Tensor) -> Members:
        """The members of one row's text.

        Args:
            mixture: (d,) what the row's attention mixed.
            known: candidates that are members for sure: the row itself, then the opening tokens.
            context: (m,) other candidates that may be.
        """
        sure = torch.tensor(known, device=context.device)
        chosen = torch.cat([sure, context[~torch.isin(context, sure)]])
        gaps = self.values[chosen] - self.block.split(mixture[None])
        logs = self.block.attention(self.pool.rows[known[:1]], self.keys[chosen])[0].T
        logs = logs - logs[: len(known)].mean(0)
        weight = logs.clamp(max=50.0).exp()
        scale = weight[: len(known)].sum(0) + weight.clamp(max=20.0).mean(0) * LENGTH
        share = weight.new_ones(len(chosen))
        for _ in range(PASSES):
            columns = ((weight / scale)[:, :, None] * gaps).flatten(1).T
            share[len(known) :] = nonnegative(columns[:, len(known) :], -columns[:, : len(known)].sum(1))
            scale = (weight * share[:, None]).sum(0)
        return Members(share, self.pool.tokens[chosen], self.pool.places[chosen])


def nonnegative(columns: Tensor, target: Tensor) -> Tensor:
    """(n,) non-negative x with the least squared error of columns @ x, by column generation.

    A small problem is solved at a time, and the columns that would still help most join it, until none would:
    the optimality conditions then hold for all of them.

    Args:
        columns: (m, n) float64.
        target: (m,).
    """
    x = torch.zeros(columns.shape[1], dtype=columns.dtype, device=columns.device)
    if not len(x):
        return x
    size = columns.norm(dim=0).clamp_min(1e-300)
    missing, used = target, torch.zeros_like(x, dtype=torch.bool)
    for _ in range(GENERATIONS):
        gain = (missing @ columns) / size
        gain[used] = -torch.inf
        best = gain.topk(min(JOIN, len(gain)))
        joining = best.indices[best.values > PRECISION * float(target.norm())]
        if not len(joining) or float(missing.norm()) < PRECISION * float(target.norm()):
            break
        working = torch.cat([(x > 0).nonzero().flatten(), joining])
        solved = nnls(columns[:, working].cpu().numpy(), target.cpu().numpy(), maxiter=100 * len(working))[0]
        x = torch.zeros_like(x)
        x[working] = torch.as_tensor(solved, device=x.device)
        used = torch.zeros_like(used)
        used[working] = True
        missing = target - columns[:, working] @ x[working]
    return x
