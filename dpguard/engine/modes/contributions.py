"""Per-example gradients in factored form: their norms and weighted sums without ever writing them out.

One use of a parameter in the forward pass contributes, for every example b, the matrix

    Outer   W_b = sum_t left[b, t] right[b, t]^T     a linear layer (Gram trick: Goodfellow, arXiv 1510.01799)
    Lookup  W_b = sum_t onehot(ids[b, t]) right[b, t]^T     an embedding
    Dense   W_b itself                                       biases, norms, what Opacus's samplers give

and several uses of one tensor (tied or repeated) add up, so squared norms need their cross terms. Book-keeping:
Bu et al., ICML 2023 (arXiv 2210.00038), section 3; everything here is float32 or wider whatever the activations are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Grams:
    """(B, T, T) Gram matrices of one backward pass, each formed once: query, key and value share their input."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tensor] = {}

    def of(self, x: Tensor) -> Tensor:
        """X X^T of (B, T, d), over d."""
        key = (x.data_ptr(), x._version, x.shape, x.stride())
        if key not in self._known:
            self._known[key] = x @ x.transpose(1, 2)
        return self._known[key]


@dataclass(frozen=True)
class Outer:
    """left (B, T, rows), right (B, T, columns)."""

    left: Tensor
    right: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return self.left.shape[0]

    def squared(self, grams: Grams) -> Tensor:
        """(B,) squared Frobenius norms: by Gram matrices where they are the smaller ones, else example by example."""
        steps, size = self.left.shape[1], self.left.shape[2] * self.right.shape[2]
        if 2 * steps**2 <= size:
            return (grams.of(self.left) * grams.of(self.right)).sum((1, 2)).clamp_(min=0)
        return torch.stack([(a.T @ b).square_().sum() for a, b in zip(self.left, self.right, strict=True)])

    def weighted(self, factors: Tensor, shape: torch.Size, into: Tensor | None) -> Tensor:
        """sum_b factors[b] W_b, added to ``into`` when given."""
        # the smaller side carries the factor, in one temporary
        if self.left.shape[2] <= self.right.shape[2]:
            left, right = self.left * factors[:, None, None], self.right
        else:
            left, right = self.left, self.right * factors[:, None, None]
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        return left.T @ right if into is None else into.addmm_(left.T, right)

    def without(self, bad: Tensor) -> Outer:
        """The same with the rows of ``bad`` (B,) examples zeroed on both sides."""
        mask = bad[:, None, None]
        return Outer(self.left.masked_fill(mask, 0.0), self.right.masked_fill(mask, 0.0))

    def dense(self, shape: torch.Size) -> Tensor:
        """(B, *shape)."""
        return (self.left.transpose(1, 2) @ self.right).reshape(self.rows, *shape)


@dataclass(frozen=True)
class Lookup:
    """ids (B, T) int64, right (B, T, d): row ids[b, t] of W_b gets right[b, t]."""

    ids: Tensor
    right: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return self.ids.shape[0]

    def squared(self, grams: Grams) -> Tensor:
        """(B,) squared norms: positions with the same id add up before they are squared."""
        same = self.ids[:, :, None] == self.ids[:, None, :]
        return (grams.of(self.right) * same).sum((1, 2)).clamp_(min=0)

    def weighted(self, factors: Tensor, shape: torch.Size, into: Tensor | None) -> Tensor:
        """See `Outer.weighted`."""
        right = (self.right * factors[:, None, None]).flatten(0, 1)
        out = right.new_zeros(shape) if into is None else into
        return out.index_add_(0, self.ids.flatten(), right)

    def without(self, bad: Tensor) -> Lookup:
        """See `Outer.without`."""
        return Lookup(self.ids, self.right.masked_fill(bad[:, None, None], 0.0))

    def dense(self, shape: torch.Size) -> Tensor:
        """(B, *shape)."""
        out = self.right.new_zeros(self.rows, *shape)
        index = self.ids[:, :, None].expand_as(self.right)
        return out.scatter_add_(1, index, self.right)


@dataclass(frozen=True)
class Dense:
    """value (B, *shape of the parameter)."""

    value: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return self.value.shape[0]

    def squared(self, grams: Grams) -> Tensor:
        """(B,) squared norms."""
        return self.value.flatten(1).square().sum(1)

    def weighted(self, factors: Tensor, shape: torch.Size, into: Tensor | None) -> Tensor:
        """See `Outer.weighted`."""
        out = (factors @ self.value.flatten(1)).reshape(shape)
        return out if into is None else into.add_(out)

    def without(self, bad: Tensor) -> Dense:
        """See `Outer.without`."""
        return Dense(self.value.masked_fill(bad.reshape(-1, *[1] * (self.value.dim() - 1)), 0.0))

    def dense(self, shape: torch.Size) -> Tensor:
        """(B, *shape)."""
        return self.value.reshape(self.rows, *shape)


Contribution = Outer | Lookup | Dense


def merge(uses: Sequence[Contribution]) -> list[Contribution]:
    """Uses of one tensor with uses of the same kind joined, which gives their cross terms for nothing."""
    if len(uses) == 1:
        return list(uses)
    outer = [u for u in uses if isinstance(u, Outer)]
    lookup = [u for u in uses if isinstance(u, Lookup)]
    dense = [u for u in uses if isinstance(u, Dense)]
    out: list[Contribution] = []
    if outer:
        out.append(Outer(torch.cat([u.left for u in outer], 1), torch.cat([u.right for u in outer], 1)))
    if lookup:
        out.append(Lookup(torch.cat([u.ids for u in lookup], 1), torch.cat([u.right for u in lookup], 1)))
    if dense:
        out.append(Dense(torch.stack([u.value for u in dense]).sum(0)))
    return out


def squared_norm(merged: Sequence[Contribution], shape: torch.Size, grams: Grams) -> Tensor:
    """(B,) squared norms of the sum of a tensor's merged uses."""
    total = merged[0].squared(grams)
    for k, use in enumerate(merged[1:], start=1):
        total = total + use.squared(grams)
        for other in merged[:k]:
            total = total + 2 * _inner(other, use, shape)
    return total.clamp(min=0) if len(merged) > 1 else total


def _inner(one: Contribution, two: Contribution, shape: torch.Size) -> Tensor:
    """(B,) inner products of two kinds of use, e.g. of an embedding and the head tied to it."""
    if isinstance(one, Outer) and isinstance(two, Lookup):
        # <W_b, V_b> = sum_{s,t} left[s, id_t] <right_s, right'_t>; without the (B, rows, columns) matrices
        picked = one.left.gather(2, two.ids[:, None, :].expand(-1, one.left.shape[1], -1))
        return (picked * (one.right @ two.right.transpose(1, 2))).sum((1, 2))
    if isinstance(one, Lookup) and isinstance(two, Outer):
        return _inner(two, one, shape)
    return (one.dense(shape) * two.dense(shape)).flatten(1).sum(1)
