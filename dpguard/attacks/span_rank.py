"""The span of a layer's inputs, read off its gradient, with the precision that the message allows.

For Y = X Wᵀ the gradient of W is dYᵀ X: its rows are combinations of the inputs X, so while there are fewer
tokens than inputs the gradient's row space is the span of the client's input vectors (arXiv 2405.15586,
section 4). What a perturbation E of the gradient (rounding, or noise) does to that space is known too: to
first order it moves the input x out of the span by E restricted to the rest, applied to c = S⁻¹ V x, so its
squared residual is |c|² times the energy of the gradient's tail per output. A candidate is held against
that figure and no hand-set tolerance.

The change of weights after some local steps is nearly a sum of gradients: every step saw slightly other
weights, and float32 weights keep few digits of a small change. Both show as a floor under the spectrum whose
level is read off the spectrum itself (`floor`). The rank is what rises above it, and nothing is proven there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betainc
from torch import Tensor

ACCUMULATED = 64.0
"""Errors of sums and products against those of the last rounding alone, for a gradient that was computed in
the precision it came in (measured over models and layers: at most 6, while true inputs reach 4,000)."""
ROUNDED = 0.6
"""The same for a gradient that was rounded once after it was computed (measured: at most .52)."""
SLACK = 30.0
"""Residuals of true inputs lie within this factor of the first-order figure (measured: at most 13)."""
FORWARD = 1e-10
"""Squared relative error of a float32 forward pass through a dozen blocks."""
RESOLUTION = 1e-3
"""A figure above this cannot tell a true input from that of a text with one other word."""
SPARE = 4
"""Directions outside the span that a certificate needs: fewer, and a random vector might lie in it."""
WORDS, CHANCE = 3e5, 1e-3
"""Words that might have stood in each place, and the largest expected number of them that may fit by chance."""


@dataclass(frozen=True)
class Span:
    """Row space of a gradient.

    Attributes:
        basis: (r, inputs) orthonormal rows, float64, by falling singular value.
        values: (r,) singular values.
        tail: squared perturbation per output (see the module's text), in squared units of the gradient.
        inputs: width of the layer's inputs.
        blurred: noise or a coarse rounding may hide inputs; the rank is then a lower bound.
        drifted: the weights moved while the message was made; the span is not quite that of any one model's
            inputs, so the rank may be off either way, and the span proves nothing.
    """

    basis: Tensor
    values: Tensor
    tail: float
    inputs: int
    blurred: bool = False
    drifted: bool = False

    @property
    def rank(self) -> int:
        """Dimensions of the span."""
        return len(self.values)

    def complement(self) -> Tensor:
        """(inputs - r, inputs) orthonormal rows: what true inputs have nothing of."""
        full: Tensor = torch.linalg.qr(self.basis.T, mode="complete").Q
        return full.T[self.rank :]

    def outside(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Squared length outside the span, relative to the vector's own, and what precision allows.

        Args:
            vectors: (..., inputs).

        Returns:
            Two (...) float64 tensors; a true input has the first below the second.
        """
        wide = vectors.double()
        inside = wide @ self.basis.T
        size = wide.pow(2).sum(-1).clamp_min(1e-300)
        residual = (wide - inside @ self.basis).pow(2).sum(-1) / size
        drift = (inside / self.values).pow(2).sum(-1) * self.tail / size
        return residual, SLACK * drift + FORWARD

    def holds(self, vectors: Tensor) -> bool:
        """Whether every vector lies in the span as far as this message can tell, and it can tell well."""
        if self.drifted or self.inputs - self.rank < SPARE or not len(vectors):
            return False
        residual, allowed = self.outside(vectors)
        fits = bool((residual <= allowed).all() and (allowed <= RESOLUTION).all())
        return fits and self.chance(float(allowed.max())) * WORDS * len(vectors) <= CHANCE

    def chance(self, residual: float) -> float:
        """How likely a random vector has at most this residual, which is Beta distributed.

        In few dimensions, as LoRA's B has, words fit by chance that no precision of wide layers lets pass.
        """
        return float(betainc((self.inputs - self.rank) / 2, self.rank / 2, min(1.0, residual)))


def span_of(gradient: Tensor, noise: float = 0.0, *, drifted: bool = False) -> Span | None:
    """The span behind a gradient, or None when nothing low-dimensional rises above rounding or noise.

    How coarse the rounding was is read off the entries' binary digits.

    Args:
        gradient: (outputs, inputs) float64.
        noise: standard deviation that the policy claims for each entry on the wire.
        drifted: the message is a change of weights after local steps, in any unit.
    """
    if not gradient.isfinite().all() or not gradient.any():
        return None
    outputs, inputs = gradient.shape
    if noise and _largest(gradient) <= _edge(outputs, inputs, noise):
        return None
    values, directions = torch.linalg.svd(gradient, full_matrices=False)[1:]
    noise = max(noise, floor(values, outputs, inputs)) if drifted else noise
    coarse = _digits(gradient) < _DIGITS[torch.float32]
    rank = int((values > _edge(outputs, inputs, noise)).sum()) if noise else _above_rounding(gradient, values)
    if rank == 0 or rank > len(values) - max(1, min(SPARE, len(values) // 8)):
        return None  # the inputs may well be more than these dimensions
    left = values[rank:].pow(2).sum() / max(1, outputs - rank)
    tail = max(float(left), noise**2 * (inputs - rank))
    return Span(directions[:rank], values[:rank], tail, inputs, blurred=noise > 0 or coarse, drifted=drifted)


def floor(values: Tensor, outputs: int, inputs: int) -> float:
    """Standard deviation of a white error that explains the bottom of a spectrum.

    The highest level that agrees with itself: the root mean square per remaining degree of freedom once the
    singular values above the edge of that very level are taken out.

    Args:
        values: singular values of an (outputs, inputs) matrix, falling.
        outputs: rows.
        inputs: columns.
    """
    above = 0
    while above < len(values):
        freedom = (outputs - above) * (inputs - above)
        level = math.sqrt(float(values[above:].pow(2).sum()) / freedom)
        found = int((values > _edge(outputs, inputs, level)).sum())
        if found <= above:
            return level
        above = found
    return 0.0


def _largest(gradient: Tensor) -> float:
    """The largest singular value, cheaper than all of them with their directions."""
    side = gradient @ gradient.T if gradient.shape[0] <= gradient.shape[1] else gradient.T @ gradient
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(side)[-1])))


def _edge(outputs: int, inputs: int, noise: float) -> float:
    """What noise alone reaches: beyond σ(√m + √n + t) with probability below exp(-t²/2), here t = 4
    (Davidson and Szarek 2001, theorem II.13)."""
    return noise * (math.sqrt(outputs) + math.sqrt(inputs) + 4.0)


def _above_rounding(gradient: Tensor, values: Tensor) -> int:
    """Singular values above what rounding can reach.

    Rounding errors of relative size u have a known variance in every entry, and the norm of such a matrix is
    at most about its largest row's plus its largest column's deviation (Bandeira and van Handel 2016).
    """
    digits = _digits(gradient)
    unit = 2.0**-digits / math.sqrt(12)
    edge = unit * float(gradient.norm(dim=0).max() + gradient.norm(dim=1).max())
    return int((values > edge * (ROUNDED if digits < _DIGITS[torch.float32] else ACCUMULATED)).sum())


_DIGITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def _digits(gradient: Tensor) -> int:
    """Binary digits after the first that the entries have: 7, 10, 23 or 52."""
    for kind, digits in _DIGITS.items():
        if torch.equal(gradient.to(kind).to(gradient.dtype), gradient):
            return digits
    return 52


def resolution_of(gradient: Tensor) -> float:
    """Relative precision of the entries as they came: 2 to minus the number of binary digits after the first."""
    return 2.0 ** -_digits(gradient)
