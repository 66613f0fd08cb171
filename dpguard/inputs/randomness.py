"""Random numbers of PyTorch's own generators from a seed, and the caller's as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the CPU's generator, and those of the CUDA devices among ``devices``; put all of them back at the end.

    No other device's is touched: ``torch.manual_seed`` seeds every one, and ``fork_rng`` puts back what it was told of.
    """
    here = (device for device in devices if device.type == "cuda")
    cuda = sorted({torch.cuda.current_device() if device.index is None else device.index for device in here})
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def devices_of(module: nn.Module) -> set[torch.device]:
    """Where a model's parameters are."""
    return {parameter.device for parameter in module.parameters()}
