"""Inner products and squared norms of many parameters' gradients, those of one shape in one operation.

A matching step on a short text is bound by the number of operations and by reading matrices, not by arithmetic. What a
text without noise sends has as many ranks as the text has tokens: M = U Vᵀ with thin factors, and
<Sᵀ X, U Vᵀ> = <S U, X V> needs neither M nor a product with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpguard.attacks.replay import Rows, Tap, form

Kind = tuple[bool, bool, torch.Size, int]
ROOM = 1 << 24
"""Numbers that are stacked at once: long texts and wide models gain nothing from more, and would fill the memory."""
SKETCH = 96
"""Ranks that are looked for; a matrix counts as thin where four times as many would fit."""
ROUNDING = 2e-6
"""Share of a matrix's norm that a factorisation may miss: what float32 sums of outer products differ by."""


class Stacked:
    """Several parameters' gradients against what arrived of them.

    Args:
        taps: the parameters; token-embedding tables are not among them.
        values: per parameter what its gradient is multiplied with, of the parameter's shape.
        exact: per parameter whether its value carries no noise, which would fill every rank.
    """

    def __init__(self, taps: Sequence[Tap], values: Sequence[Tensor], exact: Sequence[bool]) -> None:
        self.taps = taps
        # a Conv1D keeps its weight as (in, out)
        turned = [t.matrix and t.kind == "conv1d" for t in taps]
        self.values = [value.T if turn else value for turn, value in zip(turned, values, strict=True)]
        self.thin = [
            thin(value) if tap.matrix and clean else None
            for tap, value, clean in zip(taps, self.values, exact, strict=True)
        ]
        self.stacks: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self.places: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, rows: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        """Per parameter and message: (tensors, R) inner products and squared norms.

        Args:
            rows: per parameter the rows of R messages at its module.
        """
        alike: dict[Kind, list[int]] = {}
        for index, (tap, row) in enumerate(zip(self.taps, rows, strict=True)):
            tokens = row.inputs.shape[1] if tap.matrix else 0
            kind = (tap.matrix, self.thin[index] is None, self.values[index].shape, tokens)
            alike.setdefault(kind, []).append(index)
        parts = []
        for (matrix, *_), members in alike.items():
            compare, sides = self._matrices if matrix else self._vectors, self._stack(members)
            size = max(1, ROOM // max(rows[members[0]].inputs.numel(), rows[members[0]].signals.numel(), 1))
            for start in range(0, len(members), size):
                some = members[start : start + size]
                parts.append(compare(some, [rows[i] for i in some], [side[start : start + size] for side in sides]))
        dots, squares = (torch.cat(side) for side in zip(*parts, strict=True))
        order = tuple(index for members in alike.values() for index in members)
        if order not in self.places:
            self.places[order] = torch.tensor(order, device=dots.device).argsort()
        return dots[self.places[order]], squares[self.places[order]]

    def _stack(self, members: Sequence[int]) -> tuple[Tensor, ...]:
        """(n, *shape) the members' values, or (n, out, r) and (n, in, r) their factors.

        Which parameters go together depends on a model's calls, so they are put together on first use.
        """
        key = tuple(members)
        if key not in self.stacks:
            factors = [pair for index in members if (pair := self.thin[index]) is not None]
            sides = zip(*factors, strict=True) if factors else [[self.values[index] for index in members]]
            self.stacks[key] = tuple(_joined(list(side)) for side in sides)
        return self.stacks[key]

    def _matrices(self, _: Sequence[int], rows: Sequence[Rows], sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, signals = torch.stack([row.inputs for row in rows]), torch.stack([row.signals for row in rows])
        left, *right = sides
        pulled = (signals.flatten(1, 2) @ left).view(*signals.shape[:3], -1)
        other = (x.flatten(1, 2) @ right[0]).view_as(pulled) if right else x
        squares = ((x @ x.mT) * (signals @ signals.mT)).sum((2, 3))
        return (pulled * other).sum((2, 3)), squares

    def _vectors(self, members: Sequence[int], rows: Sequence[Rows], sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        formed = [form(self.taps[index], row) for index, row in zip(members, rows, strict=True)]
        gradients = torch.stack(formed).flatten(2)
        return (gradients * sides[0].flatten(1)[:, None]).sum(2), gradients.pow(2).sum(2)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors on top of each other, narrow ones widened with zero columns."""
    wide = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(tensor, (0, wide - tensor.shape[-1])) for tensor in tensors])


def thin(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """(out, r) and (in, r) factors whose product is the matrix up to rounding, None where r would not be small.

    A random sketch finds the range (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.1); its draws
    are fixed.

    >>> left, right = thin(torch.ones(400, 500))
    >>> left.shape[1], torch.allclose(left @ right.T, torch.ones(400, 500))
    (1, True)
    >>> thin(torch.eye(400)) is None
    True
    """
    if min(matrix.shape) < 4 * SKETCH:
        return None
    wide = matrix.double()  # a float32 basis of few ranks is orthogonal to 1e-5 only
    draws = torch.randn(wide.shape[1], SKETCH, generator=torch.Generator().manual_seed(0)).to(wide)
    basis = torch.linalg.qr(wide @ draws)[0]
    inside = basis.T @ wide
    if not bool((wide - basis @ inside).norm() <= ROUNDING * wide.norm()):
        return None
    u, singular, v = torch.linalg.svd(inside, full_matrices=False)
    kept = max(1, int((singular > 0.05 * ROUNDING * singular[0]).sum()))
    return ((basis @ u[:, :kept]) * singular[:kept]).to(matrix), v[:kept].T.contiguous().to(matrix)
