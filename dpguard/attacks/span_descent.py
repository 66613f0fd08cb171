"""Newton's method on rows: the few numbers that the linear conditions leave open, found by the MLP's output weight.

That weight's inputs, act(W h + b), are far more numbers than are open, and nonlinear in them, so that their
span holds almost nothing but the client's own rows: from any true (token, position) a handful of Gauss-Newton
steps ends at numerical zero, from a wrong one they stall. Steps with one curvature shared by all candidates
cost a tenth and come first, to sort the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_affine import Family
from dpguard.attacks.span_block import FirstBlock

CHUNK_ENTRIES = 24_000_000
"""Numbers of a piece's Jacobian at most."""
SHARED_FROM = 24
"""Candidates whose mean curvature serves all."""
DAMPING = 1e-3
FINEST = 1e-9


@dataclass(frozen=True)
class _Place:
    """Where candidates stand after a forward pass; (c, ...) throughout.

    Attributes:
        loss: squared sine of the angle to the span, plus the squared relative error of the deviation.
        unit: activations of norm 1.
        slope: derivative of the activation over the activations' norm.
        deviation: the state's, before it is normalised.
        inside: coordinates of ``unit`` in the span.
        before: pre-activations without their constant.
        lean: (c, k) change of log deviation with y.
        off: relative error of the deviation that the linear conditions imply.
        off_slope: (c, k) its change with y.
    """

    loss: Tensor
    unit: Tensor
    slope: Tensor
    deviation: Tensor
    inside: Tensor
    before: Tensor
    lean: Tensor
    off: Tensor
    off_slope: Tensor


class Descent:
    """Finds y for every candidate of an affine family.

    Args:
        block: the model's first block.
        rows: (P, d) candidates' embeddings.
        family: their mixtures.
        basis: (n, inputs) orthonormal span of the MLP output's inputs.
        dtype: precision of the arithmetic.
    """

    def __init__(self, block: FirstBlock, rows: Tensor, family: Family, basis: Tensor, dtype: torch.dtype) -> None:
        gain = block.mlp_in.weight * block.norm.gain
        constant = block.mlp_in.bias + block.mlp_in.weight @ block.norm.shift
        here = _centred(rows + block.output(family.start))
        free = _centred(family.free @ block.output.weight.T)
        self.act, self.epsilon, self.basis = block.act, block.norm.epsilon, basis.to(dtype)
        self.here, self.free = here.to(dtype), free.to(dtype)
        self.before, self.open, self.constant = (v.to(dtype) for v in (here @ gain.T, free @ gain.T, constant))
        told = family.deviation is not None and family.deviation_free is not None
        self.deviation = family.deviation.to(dtype) if told else None  # type: ignore[union-attr]
        self.deviation_free = family.deviation_free.to(dtype) if told else None  # type: ignore[union-attr]
        self.forwards = 0

    @property
    def size(self) -> int:
        """Numbers that are open for each candidate."""
        return len(self.free)

    def losses(self, which: Tensor, y: Tensor) -> Tensor:
        """(c,) losses of (c,) candidates at (c, k) y."""
        return torch.cat([self._at(w, v).loss for w, v in self._pieces(which, y)])

    def sort(self, which: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Losses and y after cheap steps, all with the mean curvature of some of the candidates."""
        if not self.size or not len(which):
            return self.losses(which, y), y
        some = torch.linspace(0, len(which) - 1, min(SHARED_FROM, len(which))).long()
        curvature = self._curvature(self._at(which[some], y[some])).mean(0)
        curvature.diagonal().add_(DAMPING * curvature.diagonal().mean() + FINEST)
        inverse = torch.linalg.inv(curvature)
        ends = [self._cheap(w, v, inverse, steps) for w, v in self._pieces(which, y)]
        return torch.cat([e[0] for e in ends]), torch.cat([e[1] for e in ends])

    def _cheap(self, which: Tensor, y: Tensor, inverse: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        place = self._at(which, y)
        loss, length = place.loss, torch.ones_like(place.loss)
        move = self._gradient(place) @ inverse
        for _ in range(steps):
            tried = y - length[:, None] * move
            place = self._at(which, tried)
            better = place.loss < loss
            loss = torch.where(better, place.loss, loss)
            y = torch.where(better[:, None], tried, y)
            move = torch.where(better[:, None], self._gradient(place) @ inverse, move)
            length = torch.where(better, length * 1.3, length * 0.4)
        return loss, y

    def descend(self, which: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Losses and y after damped Gauss-Newton (Levenberg-Marquardt) steps."""
        if not self.size or not len(which):
            return self.losses(which, y), y
        ends = [self._newton(w, v, steps) for w, v in self._pieces(which, y)]
        return torch.cat([e[0] for e in ends]), torch.cat([e[1] for e in ends])

    def _newton(self, which: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        place = self._at(which, y)
        loss, damping = place.loss, torch.full_like(place.loss, DAMPING)
        eye = torch.eye(self.size, dtype=y.dtype, device=y.device)
        for _ in range(steps):
            curvature = self._curvature(place)
            scale = curvature.diagonal(dim1=1, dim2=2).mean(1)
            ridge = (damping * scale + FINEST)[:, None, None] * eye
            tried = y - torch.linalg.solve_ex(curvature + ridge, self._gradient(place)).result  # singular: not taken
            new = self._at(which, tried)
            better = new.loss < loss
            loss = torch.where(better, new.loss, loss)
            y = torch.where(better[:, None], tried, y)
            damping = torch.where(better, damping / 5, damping * 8).clamp(FINEST, 1e6)
            place = self._at(which, y)
        return loss, y

    def _pieces(self, which: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(8, CHUNK_ENTRIES // (self.open.shape[1] * max(1, self.size)))
        return list(zip(which.split(size), y.split(size), strict=True))  # type: ignore[no-untyped-call]

    def _at(self, which: Tensor, y: Tensor) -> _Place:
        self.forwards += len(which)
        x = self.here[which] + y @ self.free
        deviation = (x.pow(2).mean(1) + self.epsilon).sqrt()
        before = (self.before[which] + y @ self.open) / deviation[:, None]
        with torch.enable_grad():
            inner = (before + self.constant).requires_grad_(True)
            out = self.act(inner)
            slope = torch.autograd.grad(out.sum(), inner)[0]
        size = out.detach().norm(dim=1).clamp_min(1e-30)
        unit = out.detach() / size[:, None]
        inside = unit @ self.basis.T
        lean = (x @ self.free.T) / (deviation.pow(2) * x.shape[1])[:, None]
        off, off_slope = torch.zeros_like(deviation), torch.zeros_like(lean)
        if self.deviation is not None and self.deviation_free is not None:
            claimed = (self.deviation[which] + y @ self.deviation_free) / deviation
            off, off_slope = claimed - 1, self.deviation_free / deviation[:, None] - claimed[:, None] * lean
        loss = (1 - inside.pow(2).sum(1)).clamp_min(0) + off.pow(2)
        return _Place(loss, unit, slope / size[:, None], deviation, inside, before, lean, off, off_slope)

    def _gradient(self, place: _Place) -> Tensor:
        """(c, k) half the gradient of the loss (as if the activations' norm stayed as it is)."""
        outside = place.slope * (place.unit - place.inside @ self.basis)
        along = outside @ self.open.T / place.deviation[:, None]
        return along - (outside * place.before).sum(1, keepdim=True) * place.lean + place.off[:, None] * place.off_slope

    def _curvature(self, place: _Place) -> Tensor:
        """(c, k, k) Gauss-Newton matrices."""
        scale = (place.slope / place.deviation[:, None])[:, None, :]
        jacobian = scale * self.open[None] - (place.slope * place.before)[:, None, :] * place.lean[:, :, None]
        inside = (jacobian.flatten(0, 1) @ self.basis.T).reshape(*jacobian.shape[:2], -1)
        whole: Tensor = jacobian @ jacobian.transpose(1, 2) - inside @ inside.transpose(1, 2)
        whole += place.off_slope[:, :, None] * place.off_slope[:, None, :]
        return whole


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
