"""Inner products and norms of gradients of which only some entries arrived, formed only where that is cheapest.

Few surviving entries of a weight are gathered from the layer's inputs and output gradients; many are cut out of the
whole gradient. A row of an embedding is a sum over the tokens with its id, so that pairs of tokens give its norm
and no gradient as large as the table is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPARSE = 32
"""A weight of which less than one entry in so many arrived is gathered."""
GATHERED = 1 << 24
"""Products held at once."""


def is_sparse(value: Tensor) -> bool:
    """Whether the entries of a matrix that arrived are few enough to gather."""
    return value.dim() == 2 and int(value.count_nonzero()) * SPARSE <= value.numel()


def surviving(value: Tensor) -> tuple[Tensor, Tensor]:
    """(2, K) places and (K,) values of a matrix's entries that arrived."""
    places = value.nonzero().T.contiguous()
    return places, value[places[0], places[1]]


def gathered(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """(N, K) entries of N gradients ``leftᵀ right``.

    Args:
        left: (N, T, rows).
        right: (N, T, columns).
        places: (2, K) row and column of every entry.
    """
    a, b = left.transpose(1, 2).contiguous(), right.transpose(1, 2).contiguous()
    rows, columns = places.unbind()
    step = max(1, GATHERED // max(1, left.shape[0] * left.shape[1]))
    parts = [
        (a.index_select(1, rows[first : first + step]) * b.index_select(1, columns[first : first + step])).sum(2)
        for first in range(0, len(rows), step)
    ]
    return torch.cat(parts, 1) if parts else left.new_zeros((len(left), 0))


def embedding_square(ids: Tensor, signal: Tensor, kept: Tensor) -> Tensor:
    """(N,) squared norms of an embedding's gradients over the entries that arrived.

    Args:
        ids: (N, T) rows that were read.
        signal: (N, T, d) output gradients.
        kept: (rows, d) 1 where an entry arrived.
    """
    same = ids[:, :, None] == ids[:, None, :]
    return ((signal * nn.functional.embedding(ids, kept)) @ signal.transpose(1, 2) * same).sum((1, 2)).clamp(min=0)
