"""In which precision a search scores its texts: bfloat16 where the processor multiplies it, else float32.

Where it is emulated a matrix product takes fifty times as long (measured: 1.3 against 75 billion operations a second
on a core without AVX-512), and the same budget days instead of minutes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

WIDE = 256
"""Models narrower than this gain nothing from bfloat16."""
ADVERTISED = ("avx512_bf16", "amx_bf16", "bf16")
"""What torch calls the instruction on a processor that has it."""


def search_dtype(table: torch.Tensor) -> torch.dtype:
    """The type of a search's activations.

    Args:
        table: (vocabulary, width) token embeddings, on the device of the search.
    """
    return torch.bfloat16 if table.shape[1] >= WIDE and multiplies_bfloat16(table.device) else torch.float32


def roughly(table: torch.Tensor) -> AbstractContextManager[object]:
    """Linear layers and attention in `search_dtype`, weights and sums of residual streams as they are.

    Args:
        table: (vocabulary, width) token embeddings, on the device of the search.
    """
    dtype = search_dtype(table)
    return nullcontext() if dtype == torch.float32 else torch.autocast(table.device.type, dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has an instruction for products of bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(known.get(name)) for name in ADVERTISED)
