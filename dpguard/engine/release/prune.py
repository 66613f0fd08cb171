"""Send a fraction of the entries: the largest after noise, or a public random mask."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

PLUGIN = "prune"
SORTED = 8
"""One entry in so many, or fewer: sorting the largest is quicker than finding the smallest of them."""


def entries(keep: float, size: int) -> int:
    """How many of ``size`` entries are sent: ceil(keep * size), at least one.

    >>> entries(0.07, 100), entries(0.071, 100), entries(0.001, 100)
    (7, 8, 1)
    """
    return max(1, math.ceil(keep * size * (1 - 1e-12)))  # .07 * 100 is 7.000000000000001 in floats


def apply(tensor: Tensor, setting: tuple[float, str], *, name: str, mask_seed: int) -> Tensor:
    """Zero all but ``keep`` of the entries (see `entries`).

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
    count = entries(keep, flat.numel())
    if method == "magnitude":
        chosen = largest(flat, count)
    else:
        chosen = random_indices(flat.numel(), count, name=name, mask_seed=mask_seed).to(flat.device)
    out = torch.zeros_like(flat)
    out[chosen] = flat[chosen]
    return out.reshape(tensor.shape)


def largest(flat: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` entries of largest size, of all that are not zero if fewer.

    An embedding table's gradient is zero in nearly all rows, and sorting as many entries as a half takes longer than
    finding the smallest of them.
    """
    filled = int(flat.count_nonzero())
    if filled <= count:
        return flat.nonzero()[:, 0]
    if filled < flat.numel() // 2:
        places = flat.nonzero()[:, 0]
        return places[largest(flat[places], count)]
    size = flat.abs()
    if count * SORTED < len(size):
        return size.topk(count, sorted=False).indices
    edge = size.kthvalue(len(size) - count + 1).values
    chosen = size > edge
    level = (size == edge).nonzero()[:, 0]
    chosen[level[: count - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0]


def random_indices(size: int, count: int, *, name: str, mask_seed: int) -> Tensor:
    """The public random mask of a parameter: (count,) distinct indices below ``size``."""
    digest = hashlib.sha256(f"{mask_seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(size, generator=generator)[:count]
