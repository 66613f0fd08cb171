"""Check N on the source that a deployment draws from, which no seed can repeat."""

from __future__ import annotations

import math

import torch

from dpguard.engine import noise as noises
from dpguard.engine.audit.noise import ALPHA, Draws, chance
from dpguard.engine.audit.report import Row, judged

DRAWS, PIECES = 1 << 18, 64
STD = 2.0


def check() -> list[Row]:
    """The law of `noise.add_noise_` without a seed; figures differ every time, so they are rounded while it holds."""
    return [_law(dtype) for dtype in (torch.float32, torch.float64)]


def _law(dtype: torch.dtype) -> Row:
    values = noises.add_noise_(torch.zeros(DRAWS, dtype=dtype), STD, noises.source(None)).double() / STD
    squares = values.square()
    draws = Draws(DRAWS, float(squares.sum()), float(squares.square().sum()), DRAWS)
    rows = values.reshape(PIECES, -1)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    r = float((rows @ rows.T).abs().fill_diagonal_(0.0).max())
    gaussian = abs(draws.kurtosis - 3) <= 8 * math.sqrt(24 / DRAWS)
    apart = chance(r, rows.shape[1]) >= ALPHA / (PIECES * (PIECES - 1) / 2)
    holds = draws.fits(ALPHA) and gaussian and apart
    digits = 1 if holds else 4
    figure = f"std {draws.ratio:.{digits}f}, kurtosis {draws.kurtosis:.{digits}f}, correlation {r:.{digits - 1}f}"
    return judged("N", f"the source without a seed, {str(dtype)[6:]}", figure, "1, 3, 0", holds)
