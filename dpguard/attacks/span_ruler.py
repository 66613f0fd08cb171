"""Distances of states from what a linear picture predicts, in units of what context adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_picture import Picture
from dpguard.attacks.span_sites import Probe


@dataclass(frozen=True)
class Ruler:
    """A picture in units in which context has unit covariance.

    Attributes:
        out: (d, d) maps a state to those units.
        back: (d, d) maps them back.
        tokens: (n, d) contribution of each token, in states.
        places: (L, d) contribution of each position and the constant, in states.
        fine_tokens: ``tokens`` in those units.
        fine_places: ``places`` in those units.
    """

    out: Tensor
    back: Tensor
    tokens: Tensor
    places: Tensor
    fine_tokens: Tensor
    fine_places: Tensor

    def distances(self, states: Tensor) -> Tensor:
        """(k, n, L) mean squared distance of each state from each token at each position."""
        gap = (states @ self.out)[:, None] - self.fine_places[None]
        cross = self.fine_tokens @ gap.flatten(0, 1).T
        square = self.fine_tokens.pow(2).sum(1)[:, None] - 2 * cross + gap.pow(2).sum(2).flatten()
        table: Tensor = square.reshape(len(square), len(states), -1).transpose(0, 1) / states.shape[1]
        return table


def ruler(probe: Probe, picture: Picture, tokens: Tensor, length: int) -> Ruler:
    """The ruler of a picture for texts of ``length`` tokens."""
    size, axes = torch.linalg.eigh(picture.scatter)
    deviation = size.clamp_min(float(size.max()) * 1e-7 + 1e-12).sqrt()
    width = probe.embedding.shape[1]
    out = (axes / deviation).float()
    words = probe.embedding[tokens] @ picture.weights[:width].float()
    places = picture.constant(probe.positions(length)).float()
    return Ruler(out, (axes * deviation).T.float(), words, places, words @ out, places @ out)
