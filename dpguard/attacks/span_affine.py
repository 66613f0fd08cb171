"""What the attention's output and the MLP's input say about a row together: its state, up to a few numbers.

A row's state is ``norm(z + W o + b)``, and o lies in the span of the output layer's inputs: o = c V. The state
in turn lies in the span of the MLP's inputs. Written with the row's own (unknown) deviation as one more number,
that second condition is linear in c, with the same matrix for every candidate z. So one decomposition solves
all candidates at once, up to the matrix's null space: with few tokens a handful of directions, which stem from
rows with the same token and position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_block import FirstBlock
from dpguard.attacks.span_rank import Span

SAFETY = 6.0
"""How far the null space's singular values stay below the largest error that the spans may have, at least."""


@dataclass(frozen=True)
class Family:
    """For every candidate an affine family of mixtures ``start + y @ free`` (float64).

    Attributes:
        start: (P, d) mixtures o at y = 0, nearest to what an average context would give.
        free: (k, d) directions that stay open.
        deviation: (P,) deviation of z + W o + b that the conditions imply at y = 0, or None without an MLP input.
        deviation_free: (k,) its change along the open directions.
    """

    start: Tensor
    free: Tensor
    deviation: Tensor | None = None
    deviation_free: Tensor | None = None

    @property
    def size(self) -> int:
        """Open directions."""
        return len(self.free)


def family_of(block: FirstBlock, rows: Tensor, guess: Tensor, outputs: Span | None, inputs: Span | None) -> Family:
    """Solve the linear conditions on all candidates at once.

    Args:
        block: in float64.
        rows: (P, d) candidates' embeddings.
        guess: (P, d) mixtures to stay near to.
        outputs: of the attention output's inputs, or None when that weight is not shared.
        inputs: of the MLP's inputs, likewise.
    """
    basis = torch.eye(block.width, dtype=torch.float64, device=rows.device) if outputs is None else outputs.basis
    near = guess @ basis.T
    if inputs is None:
        return Family(near @ basis, basis)
    outside = inputs.complement()
    mixed = _scaled(block, basis @ block.output.weight.T)
    matrix = torch.cat([mixed, block.norm.shift[None]]) @ outside.T
    rank, left, values, right = _decompose(matrix, _error(block, mixed, outputs, inputs))
    target = -_scaled(block, rows + block.output.bias) @ outside.T
    known = (target @ right[:rank].T / values[:rank]) @ left[:, :rank].T
    open_ = left[:, rank:].T
    expected = torch.cat([near, (rows + block.output(near @ basis)).std(1, correction=0)[:, None]], dim=1)
    whole = known + (expected - known) @ open_.T @ open_
    return Family(whole[:, :-1] @ basis, open_[:, :-1] @ basis, whole[:, -1], open_[:, -1])


def _scaled(block: FirstBlock, x: Tensor) -> Tensor:
    """(..., d) centred and times the norm's gain."""
    return (x - x.mean(-1, keepdim=True)) * block.norm.gain


def _decompose(matrix: Tensor, error: float) -> tuple[int, Tensor, Tensor, Tensor]:
    """Rank above the error and (U, S, V) with all of U."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=True)
    return int((values > error).sum()), left, values, right


def _error(block: FirstBlock, mixed: Tensor, outputs: Span | None, inputs: Span) -> float:
    """What rounding of the two gradients can do to the matrix: its Frobenius norm, to first order."""
    moved = ((mixed @ inputs.basis.T) / inputs.values).pow(2).sum() * inputs.tail
    moved = moved + ((block.norm.shift @ inputs.basis.T) / inputs.values).pow(2).sum() * inputs.tail
    if outputs is not None:
        reach = torch.linalg.matrix_norm(_scaled(block, block.output.weight.T), 2)
        moved = moved + (reach / outputs.values).pow(2).sum() * outputs.tail
    return SAFETY * float(moved.sqrt())
