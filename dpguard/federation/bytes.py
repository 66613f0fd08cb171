"""The bytes of a message on the wire, by an encoding that `encode` really makes and `decode` reads back.

Names, shapes and the table are public and known to both ends, so a tensor costs its content alone, and one that is
not shared costs nothing. By the table's columns:

- neither ``keep`` nor ``bits``: a float32 an entry;
- ``keep``: the entries that are not zero, after the cheaper of a bitmap and a list of indices (of as few whole bytes
  as the tensor's size needs); under ``prune: random`` the mask comes from a public seed and costs nothing;
- ``bits``: so many bits an entry and one float32, the step between two levels. One bit says the sign alone, so
  entries that are zero are left out as if they were pruned.

A byte before a tensor that may leave entries out says how (all, bitmap, list), and four bytes before a list how
many. A message of further release operations is counted as float32. What a transport or secure aggregation adds is
not counted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpguard.engine.release.prune import entries, random_indices
from dpguard.policy.table import Plan, Rule

ALL, BITMAP, LIST = 0, 1, 2
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def message_bytes(tensors: Mapping[str, Tensor], plan: Plan) -> int:
    """How many bytes `encode` would make of a message, without making them.

    Args:
        tensors: shared parameter name -> tensor on the wire.
        plan: the client's.
    """
    return sum(_size(tensors[name], plan[name]) for name in plan.shared)


def _size(value: Tensor, rule: Rule) -> int:
    total = value.numel()
    if not _leaves_out(rule):
        count = entries(rule.keep, total) if _public_mask(rule) else total
        return _values_size(count, rule)
    kept = int(torch.count_nonzero(value))
    return 1 + min(
        _values_size(total, rule) if rule.bits != 1 or kept == total else 1 << 62,
        math.ceil(total / 8) + _values_size(kept, rule),
        4 + kept * _index_width(total) + _values_size(kept, rule),
    )


def _leaves_out(rule: Rule) -> bool:
    """Whether which entries are sent depends on the message."""
    if rule.release or _public_mask(rule):
        return False
    return rule.keep < 1 or rule.bits == 1


def _public_mask(rule: Rule) -> bool:
    return not rule.release and rule.keep < 1 and rule.prune == "random" and rule.bits != 1


def _bits(rule: Rule) -> int | None:
    return None if rule.release else rule.bits


def _values_size(count: int, rule: Rule) -> int:
    bits = _bits(rule)
    return 4 * count if bits is None else 4 + math.ceil(count * bits / 8)


def _index_width(total: int) -> int:
    """Whole bytes of an index below ``total``.

    >>> _index_width(256), _index_width(257)
    (1, 2)
    """
    return max(1, math.ceil((total - 1).bit_length() / 8))


def encode(tensors: Mapping[str, Tensor], plan: Plan, *, mask_seed: int = 0) -> bytes:
    """A message as bytes; lossless for float32 tensors made under the plan.

    Args:
        tensors: shared parameter name -> tensor on the wire.
        plan: the client's.
        mask_seed: public seed of random masks (`Update.mask_seed`).
    """
    return b"".join(_encoded(name, tensors[name], plan[name], mask_seed) for name in plan.shared)


def _encoded(name: str, value: Tensor, rule: Rule, mask_seed: int) -> bytes:
    flat: Floats = value.detach().to(torch.float32).flatten().numpy()
    if not _leaves_out(rule):
        return _values(flat[_mask(name, flat.size, rule, mask_seed)] if _public_mask(rule) else flat, rule)
    (kept,) = np.nonzero(flat)
    sparse = _values(flat[kept], rule)
    width = _index_width(flat.size)
    bitmap = bytes([BITMAP]) + np.packbits(flat != 0).tobytes() + sparse
    options = [bitmap, bytes([LIST]) + struct.pack("<I", len(kept)) + _indices(kept, width) + sparse]
    if rule.bits != 1 or len(kept) == flat.size:
        options.insert(0, bytes([ALL]) + _values(flat, rule))
    return min(options, key=len)


def _mask(name: str, size: int, rule: Rule, mask_seed: int) -> Numbers:
    count = entries(rule.keep, size)
    found: Numbers = random_indices(size, count, name=name, mask_seed=mask_seed).numpy()
    return found


def _indices(kept: Numbers, width: int) -> bytes:
    return kept.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _values(flat: Floats, rule: Rule) -> bytes:
    bits = _bits(rule)
    if bits is None:
        return flat.astype("<f4").tobytes()
    step, levels = _step(flat, bits)
    whole = (flat > 0).astype(np.int64) if bits == 1 else _divided(flat, step) + levels
    return struct.pack("<f", step) + np.packbits(_spread(whole, bits)).tobytes()


def _step(flat: Floats, bits: int) -> tuple[np.float32, int]:
    """The distance between two levels as the quantiser had it, and how many levels a side there are."""
    levels = 1 if bits == 1 else 2 ** (bits - 1) - 1
    largest = np.abs(flat).max(initial=np.float32(0))
    guess = np.float32(largest / np.float32(levels))
    # levels x step was rounded to float32 when the message was made, so its quotient may be a neighbour
    for step in (guess, np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(np.inf))):
        if np.array_equal(_divided(flat, step).astype(np.float32) * step, flat):
            return step, levels
    return guess, levels


def _divided(flat: Floats, step: np.float32) -> Numbers:
    if step == 0:
        return np.zeros(flat.size, dtype=np.int64)
    rounded: Numbers = np.rint(flat.astype(np.float64) / float(step)).astype(np.int64)
    return rounded


def _spread(whole: Numbers, bits: int) -> NDArray[np.uint8]:
    """Every number as ``bits`` zeros and ones, highest first."""
    shifts = np.arange(bits - 1, -1, -1)
    return ((whole[:, None] >> shifts) & 1).astype(np.uint8).flatten()


def decode(message: bytes, plan: Plan, *, mask_seed: int = 0) -> dict[str, Tensor]:
    """The tensors of `encode`.

    Raises:
        ValueError: fewer or more bytes than the plan's message has.
    """
    out, at = {}, 0
    for name in plan.shared:
        rule = plan[name]
        flat, at = _decoded(message, at, name, rule, mask_seed)
        out[name] = torch.from_numpy(flat).reshape(rule.slot.shape)
    if at != len(message):
        raise ValueError(f"the message has {len(message)} bytes, the plan's has {at}")
    return out


def _decoded(message: bytes, at: int, name: str, rule: Rule, mask_seed: int) -> tuple[Floats, int]:
    total = rule.slot.size
    flat = np.zeros(total, dtype=np.float32)
    where: Numbers | slice = slice(None)
    count = total
    if _public_mask(rule):
        where, count = _mask(name, total, rule, mask_seed), entries(rule.keep, total)
    elif _leaves_out(rule):
        how, at = message[at], at + 1
        if how == BITMAP:
            length = math.ceil(total / 8)
            marks = np.unpackbits(np.frombuffer(message, np.uint8, length, at), count=total)
            where, at = np.flatnonzero(marks), at + length
            count = len(where)
        elif how == LIST:
            width = _index_width(total)
            (count,), at = struct.unpack_from("<I", message, at), at + 4
            padded = np.zeros((count, 8), dtype=np.uint8)
            padded[:, :width] = np.frombuffer(message, np.uint8, count * width, at).reshape(count, width)
            where, at = padded.view("<u8")[:, 0].astype(np.int64), at + count * width
    flat[where] = _values_read(message, at, count, rule)
    return flat, at + _values_size(count, rule)


def _values_read(message: bytes, at: int, count: int, rule: Rule) -> Floats:
    bits = _bits(rule)
    if bits is None:
        return np.frombuffer(message, "<f4", count, at).astype(np.float32)
    (step,) = struct.unpack_from("<f", message, at)
    drawn = np.unpackbits(np.frombuffer(message, np.uint8, math.ceil(count * bits / 8), at + 4), count=count * bits)
    whole = drawn.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))
    levels: Numbers = 2 * whole - 1 if bits == 1 else whole - (2 ** (bits - 1) - 1)
    found: Floats = levels.astype(np.float32) * np.float32(step)
    return found
