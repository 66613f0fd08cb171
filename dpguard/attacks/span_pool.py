"""Which (token, position) pairs a batch may hold: those whose embedding lies in the span of the first block's inputs.

The test is exact but not complete: an embedding is nearly the sum of a token's and a position's part, so with
more than a few texts every token of the batch passes at every position that is in use. The bag of words and
the longest length are exact then, the places are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_block import FirstBlock
from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.vocabulary import Frame

NORMALS = 24
"""Random directions outside the span that every pair is held against before the exact test."""
PROMISING = 0.02
"""Share of an embedding outside the span up to which it gets the exact test."""
GENEROUS, FACTOR = 1e-5, 10.0
"""Share of an embedding outside the span up to which a pair stays in any case, and factor on what precision allows.
Two tokens at the same two places each are nearly one another's sums; the direction that they leave may be too
weak to be seen, and then a true embedding misses the span by more than the first-order figure."""
READERS = frozenset({"query", "value", "qkv", "key"})


@dataclass(frozen=True)
class Pool:
    """Candidate rows.

    Attributes:
        tokens: (P,) token ids.
        places: (P,) positions from 0.
        rows: (P, d) their embeddings, float64.
    """

    tokens: Tensor
    places: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, keep: Tensor) -> Pool:
        """The pairs that an index or a mask names."""
        return Pool(self.tokens[keep], self.places[keep], self.rows[keep])

    def pair(self, index: int) -> tuple[int, int]:
        """(position, token) of one candidate."""
        return int(self.places[index]), int(self.tokens[index])


def pool_of(
    block: FirstBlock, readers: Sequence[Evidence], tokens: Tensor, frame: Frame, generator: torch.Generator
) -> Pool:
    """Every pair that all readers allow, by position; the special tokens stand where a text can have them.

    Args:
        block: the model's first block.
        readers: evidence of its query, key or value weights, at least one.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        generator: source of the random directions.
    """
    ends = torch.tensor(sorted(set(frame.suffix)), dtype=tokens.dtype, device=tokens.device)
    names = torch.cat([tokens, ends])
    sketch = _Sketch(block, readers[0], names, frame, generator)
    found: list[Pool] = []
    for place in range(len(block.places)):
        if place < len(frame.prefix):
            here = torch.tensor([frame.prefix[place]], device=tokens.device)
        else:
            here = names[sketch.promising(place)]
        candidates = _pairs(block, here, place)
        if place >= len(frame.prefix):
            for reader in readers:
                candidates = candidates.of(_allowed(reader, block, candidates, frame))
        if not len(candidates):
            break
        found.append(candidates)
    if not found:
        return _pairs(block, tokens[:0], 0)
    return Pool(*(torch.cat(column) for column in zip(*((p.tokens, p.places, p.rows) for p in found), strict=True)))


def _pairs(block: FirstBlock, tokens: Tensor, place: int) -> Pool:
    places = torch.full_like(tokens, place)
    return Pool(tokens, places, block.embed(tokens, places))


def _opening(block: FirstBlock, frame: Frame) -> Tensor:
    """(d,) embedding of the first token, from which keys tell differences."""
    first = torch.tensor(frame.prefix[:1], device=block.words.device)
    return block.embed(first, torch.zeros_like(first))[0]


def _allowed(reader: Evidence, block: FirstBlock, candidates: Pool, frame: Frame) -> Tensor:
    vectors = candidates.rows - _opening(block, frame) if reader.differences else candidates.rows
    residual, allowed = reader.span.outside(vectors)
    return residual <= FACTOR * allowed + GENEROUS


class _Sketch:
    """A few normals of the span applied to every token at a position, without forming its embedding."""

    def __init__(
        self, block: FirstBlock, reader: Evidence, names: Tensor, frame: Frame, generator: torch.Generator
    ) -> None:
        basis = reader.span.basis
        drawn = torch.randn((NORMALS, block.width), generator=generator, dtype=torch.float64).to(basis.device)
        normals = torch.nn.functional.normalize(drawn - drawn @ basis.T @ basis, dim=1)
        self.share = (block.width - reader.span.rank) / NORMALS
        gain, self.epsilon = block.entrance.gain, block.entrance.epsilon
        self.words, self.places = _centred(block.words[names]), _centred(block.places)
        self.by_word = (self.words @ (normals * gain).T).float()
        self.by_place = (self.places @ (normals * gain).T).float()
        shift = block.entrance.shift - (_opening(block, frame) if reader.differences else 0.0)
        self.constant = (normals @ shift).float()
        self.size = float(gain.pow(2).sum() + shift.pow(2).sum())
        self.spread = self.words.pow(2).mean(1).float()
        self.words = self.words.float()

    def promising(self, place: int) -> Tensor:
        """(n,) bool: tokens that the normals allow at a position."""
        there = self.places[place]
        cross = self.words @ there.float() * (2 / len(there))
        deviation = (self.spread + cross + float(there.pow(2).mean()) + self.epsilon).clamp_min(1e-12).sqrt()
        broken = (self.by_word + self.by_place[place]) / deviation[:, None] + self.constant
        return broken.pow(2).sum(1) * self.share < PROMISING * self.size


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)
