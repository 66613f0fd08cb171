"""Send few bits an entry: symmetric per tensor, scale = largest magnitude; one bit sends the sign."""

from __future__ import annotations

import torch
from torch import Tensor

PLUGIN = "quantise"


def apply(tensor: Tensor, setting: int, *, name: str, mask_seed: int) -> Tensor:
    """Round to 2^(bits-1) - 1 levels a side; zero stays zero; ``bits`` = 1 gives sign times scale.

    >>> apply(torch.tensor([1.0, -0.2, 0.0]), 1, name="w", mask_seed=0)
    tensor([ 1., -1.,  0.])
    """
    scale = tensor.abs().max() if tensor.numel() else torch.zeros(())
    if scale == 0:
        return tensor
    if setting == 1:
        return torch.sign(tensor) * scale
    levels = float(2 ** (setting - 1) - 1)
    rounded: Tensor = torch.round(tensor / scale * levels)
    return rounded * (scale / levels)
