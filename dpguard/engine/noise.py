"""Where noise and coins come from: a seed in studies, a cryptographic stream everywhere else.

PyTorch's CPU generator is a Mersenne twister that keeps 32 bits of its seed and can be predicted from its output.
An entry whose clean value is known (an embedding row of an absent token is zero) shows the noise itself, so a
server could find the seed by trying all of them, and subtract the rest. Without a seed, noise is therefore drawn
from AES-256 in counter mode under a fresh key of the operating system's entropy, at nearly the same speed.
"""

from __future__ import annotations

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dpguard.errors import UserError

CHUNK = 1 << 17
"""Entries drawn at a time: the working set stays in the processor's cache."""


_ZEROS = bytes(4 * CHUNK)


class SecureSource:
    """Gaussian and uniform numbers that nobody can predict, not even from all that was drawn before."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def __deepcopy__(self, _memo: object) -> SecureSource:
        """A copy draws other numbers: one stream under two messages would cancel."""
        return SecureSource()

    def words(self, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) random integers over the whole range of ``dtype`` (int32 or int64)."""
        if os.getpid() != self._process:  # a fork took the stream along: its parent draws the same
            self._begin()
        size = count * (4 if dtype == torch.int32 else 8)
        drawn = bytearray(size + 16)  # the cipher asks for a block more than it fills
        zeros = _ZEROS if size == len(_ZEROS) else bytes(size)
        self._stream.update_into(zeros, drawn)
        return torch.frombuffer(drawn, dtype=dtype, count=count)

    def add_normal_(self, flat: Tensor, std: float) -> None:
        """Add normal numbers of ``std`` to a flat CPU tensor, by the Box-Muller transform in its own precision."""
        half = (flat.numel() + 1) // 2
        bits = torch.int64 if flat.dtype == torch.float64 else torch.int32
        depth = 63 if flat.dtype == torch.float64 else 31
        drawn = self.words(2 * half, bits).to(flat.dtype)
        # |word| keeps full relative precision near zero, where the tail of the distribution comes from
        radius = drawn[:half].abs_().add_(0.5).log_().mul_(-2).add_(2 * depth * math.log(2)).clamp_(min=0).sqrt_()
        angle = drawn[half:].mul_(math.pi * 2.0**-depth)
        flat[:half].addcmul_(torch.cos(angle), radius, value=std)
        rest = flat.numel() - half
        flat[half:].addcmul_(angle.sin_()[:rest], radius[:rest], value=std)

    def normal(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(count,) standard normal numbers."""
        out = torch.zeros(count, dtype=dtype)
        self.add_normal_(out, 1.0)
        return out

    def uniform(self, count: int) -> Tensor:
        """(count,) float64 numbers in [0, 1) with 53 random bits."""
        return (self.words(count, torch.int64) >> 11).to(torch.float64).mul_(2.0**-53).remainder_(1.0)


Source = torch.Generator | SecureSource
"""Who draws: a seeded generator, or `SecureSource`."""


def source(seed: int | None, device: str = "cpu") -> Source:
    """A generator from a seed (studies and tests), or a `SecureSource` when the seed is None.

    Raises:
        UserError: a seed that is no whole number of at least 0.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UserError(f"seed is {seed!r}; expected a whole number of at least 0, or None for a secret one")
    return SecureSource() if seed is None else torch.Generator(device).manual_seed(seed)


def secret_seed() -> int:
    """A seed that nobody knows, for generators of PyTorch that have to be seeded (dropout).

    It keeps 32 bits of it on a CPU: the best that its dropout can be given.
    """
    return int.from_bytes(os.urandom(7), "big")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of a type are summed and noised: float32, or wider where they are.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def add_noise_(value: Tensor, std: float, drawn_from: Source, *, divide_by: float = 1) -> Tensor:
    """Add Gaussian noise of ``std`` to every entry of a float32 or float64 tensor, then divide, in place.

    Returns:
        ``value``, or a contiguous copy where it was not contiguous.

    Raises:
        TypeError: a narrower type, in which some entries would get no noise at all.
    """
    if value.dtype != wide(value.dtype):
        raise TypeError(f"noise on a tensor of {value.dtype}; expected float32 or float64")
    value = value.contiguous()
    flat = value.view(-1)
    # noise that travels to another device goes in fewer, larger pieces
    chunk = CHUNK if value.device.type == "cpu" else 1 << 22
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        if std and isinstance(drawn_from, SecureSource) and piece.device.type == "cpu":
            drawn_from.add_normal_(piece, std)
        elif std:
            piece.add_(normal(piece.numel(), drawn_from, value.dtype).to(value.device), alpha=std)
        if divide_by != 1:
            piece.div_(divide_by)
    return value


def normal(count: int, drawn_from: Source, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count,) standard normal numbers."""
    if isinstance(drawn_from, SecureSource):
        return drawn_from.normal(count, dtype)
    return torch.randn(count, generator=drawn_from, device=drawn_from.device, dtype=dtype)


def uniform(count: int, drawn_from: Source) -> Tensor:
    """(count,) numbers in [0, 1)."""
    if isinstance(drawn_from, SecureSource):
        return drawn_from.uniform(count)
    return torch.rand(count, generator=drawn_from, device=drawn_from.device)
