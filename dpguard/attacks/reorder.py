"""Proposals for another order of the same tokens (LAMP, NeurIPS 2022, arXiv 2202.08827, section 4.3)."""

from __future__ import annotations

import torch


def propose(positions: list[int], rng: torch.Generator) -> list[int]:
    """The positions in another order: two swapped, one moved, a segment moved, or a prefix put last.

    >>> sorted(propose([1, 2, 3, 4], torch.Generator().manual_seed(0)))
    [1, 2, 3, 4]
    """
    size = len(positions)
    if size < 2:
        return list(positions)
    kind, first, second, third = _draw(4, rng), _draw(size, rng), _draw(size, rng), _draw(size, rng)
    out = list(positions)
    if kind == 0:
        out[first], out[second] = out[second], out[first]
        return out
    if kind == 1:
        return _moved(out, first, first + 1, second)
    if kind == 2:
        start, stop = sorted((first, second))
        return _moved(out, start, stop + 1, third)
    return out[first:] + out[:first]


def shuffle(positions: list[int], rng: torch.Generator) -> list[int]:
    """The positions in a random order."""
    return [positions[index] for index in torch.randperm(len(positions), generator=rng).tolist()]


def _moved(items: list[int], start: int, stop: int, place: int) -> list[int]:
    """Cut out items[start:stop] and put it back at ``place`` (counted in what is left)."""
    segment, rest = items[start:stop], items[:start] + items[stop:]
    return rest[:place] + segment + rest[place:]


def _draw(below: int, rng: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=rng))
