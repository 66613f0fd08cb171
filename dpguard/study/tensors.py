"""Tensors that cells share, kept as safetensors in the study's cache: weights, and what clients have at home."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dpguard.study.cache import TENSORS, Cache

Tensors = dict[str, Tensor]


def shared(cache: Cache, key: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
    """What ``make`` gives, from the cache when an entry of this key is there and whole; see `Cache`.

    Args:
        cache: the study's.
        key: what they are made from; ``key["what"]`` names the file.
        make: makes them.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one = shared(Cache(folder), {"what": "weights"}, lambda: {"w": torch.ones(2)})
    ...     shared(Cache(folder), {"what": "weights"}, lambda: {"w": torch.zeros(2)})["w"]
    tensor([1., 1.])
    """

    return cache.entry(key, TENSORS, load_file, make, _write)


def keep(cache: Cache, key: Mapping[str, Any], tensors: Tensors) -> None:
    """Keep tensors that were just made, in place of an entry of this key: what an attack reads is what was judged.

    Args:
        cache: the study's.
        key: as for `shared`.
        tensors: to keep.
    """
    cache.put(key, TENSORS, tensors, _write)


def _write(path: Path, made: Tensors) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in made.items()}, path)
