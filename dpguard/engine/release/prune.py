"""Send a fraction of the entries: the largest after noise, or a public random mask."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

PLUGIN = "prune"


def apply(tensor: Tensor, setting: tuple[float, str], *, name: str, mask_seed: int) -> Tensor:
    """Zero all but ceil(keep * n) entries (at least one).

    Args:
        tensor: the noised gradient of one parameter.
        setting: (keep, ``magnitude`` or ``random``).
        name: the parameter's name; with ``mask_seed`` it decides the random mask.
        mask_seed: public seed.

    >>> apply(torch.tensor([1.0, -3.0, 2.0]), (0.3, "magnitude"), name="w", mask_seed=0)
    tensor([ 0., -3.,  0.])
    """
    keep, method = setting
    if keep >= 1:
        return tensor
    flat = tensor.flatten()
    count = max(1, math.ceil(keep * flat.numel()))
    if method == "magnitude":
        chosen = flat.abs().topk(count).indices
    else:
        chosen = random_indices(flat.numel(), count, name=name, mask_seed=mask_seed).to(flat.device)
    out = torch.zeros_like(flat)
    out[chosen] = flat[chosen]
    return out.reshape(tensor.shape)


def random_indices(size: int, count: int, *, name: str, mask_seed: int) -> Tensor:
    """The public random mask of a parameter: (count,) distinct indices below ``size``."""
    digest = hashlib.sha256(f"{mask_seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(size, generator=generator)[:count]
