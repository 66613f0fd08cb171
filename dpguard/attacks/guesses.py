"""Soft texts that a matching attack moves: token embeddings, masks, label guesses, and how they start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.labels import given_away
from dpguard.attacks.language import Corpus, public_lengths
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.attacks.vocabulary import Frame, frame_of
from dpguard.inputs.batch import Batch

HYPOTHESES = 16
MULTISETS = 4096
"""Multisets of labels that are listed; of more, some are drawn."""
BLIND_LENGTHS = range(1, 21)


@dataclass(frozen=True)
class Guesses:
    """R messages of B texts each, N = R * B rows padded to L tokens.

    Attributes:
        embeddings: (N, L, d) token embeddings.
        ids: (N, L) special and padding tokens where they belong; 0 at free positions.
        mask: (N, L) int64, 1 for tokens.
        free: (N, L) bool, positions that hold the text itself.
        labels: (N,) class guesses.
        texts: B.
    """

    embeddings: Tensor
    ids: Tensor
    mask: Tensor
    free: Tensor
    labels: Tensor
    texts: int

    @property
    def messages(self) -> int:
        """R."""
        return len(self.mask) // self.texts

    @property
    def batch(self) -> Batch:
        """The rows as the model takes them."""
        return Batch(self.ids, self.mask, self.labels)

    def at(self, messages: Tensor | list[int]) -> Guesses:
        """The rows of some messages, in that order (a message may come several times)."""
        index = torch.as_tensor(messages, dtype=torch.int64, device=self.mask.device)
        rows = (index[:, None] * self.texts + torch.arange(self.texts, device=index.device)).flatten()
        return Guesses(
            self.embeddings[rows], self.ids[rows], self.mask[rows], self.free[rows], self.labels[rows], self.texts
        )

    def moved(self, embeddings: Tensor) -> Guesses:
        """The same rows at other embeddings (N, L, d)."""
        return replace(self, embeddings=embeddings)

    @staticmethod
    def join(parts: list[Guesses]) -> Guesses:
        """Messages of several guesses of one width, one after the other."""
        fields = zip(*((p.embeddings, p.ids, p.mask, p.free, p.labels) for p in parts), strict=True)
        embeddings, ids, mask, free, labels = (torch.cat(side) for side in fields)
        return Guesses(embeddings, ids, mask, free, labels, parts[0].texts)


def label_guesses(seen: Observation, texts: int, rng: torch.Generator) -> list[tuple[int, ...]]:
    """What the labels may be: as disclosed, or every multiset of classes (at most `HYPOTHESES` of them, drawn)."""
    if seen.disclosed.labels is not None:
        return [tuple(seen.disclosed.labels)]
    classes = int(seen.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    if texts == 1 and (shown := given_away(seen, classes)) is not None:
        return [(shown,)]
    if math.comb(classes + texts - 1, texts) > MULTISETS:  # the first so many of them would lack the later classes
        drawn = torch.randint(classes, (8 * HYPOTHESES, texts), generator=rng).sort(dim=1).values.tolist()
        return list(dict.fromkeys(tuple(labels) for labels in drawn))[:HYPOTHESES]
    every = list(itertools.combinations_with_replacement(range(classes), texts))
    if len(every) <= HYPOTHESES:
        return every
    return [every[index] for index in torch.randperm(len(every), generator=rng)[:HYPOTHESES].tolist()]


def length_guesses(told: Disclosed, texts: int, messages: int, longest: int, rng: torch.Generator) -> Tensor:
    """(messages, texts) token counts: as disclosed, or drawn from the public texts' lengths."""
    if told.lengths is not None:
        return torch.tensor(told.lengths, dtype=torch.int64).repeat(messages, 1)
    size = frame_of(told.tokenizer).size
    known = public_lengths(Corpus.of(told)) or [size + n for n in BLIND_LENGTHS]
    pool = torch.tensor(known, dtype=torch.int64).clamp(min=size + 1, max=longest)
    return pool[torch.randint(len(pool), (messages, texts), generator=rng)]


def draw(
    lengths: Tensor, labels: tuple[int, ...], *, table: Tensor, norm: float, tokenizer: Any, rng: torch.Generator
) -> Guesses:
    """Random directions of one norm at the free positions, special tokens where the tokenizer puts them.

    Args:
        lengths: (R, B) token counts with special tokens.
        labels: (B,) classes, the same in every message.
        table: (rows, d) token-embedding table.
        norm: L2 norm of every drawn embedding.
        tokenizer: the public tokenizer.
        rng: source of the directions.
    """
    frame: Frame = frame_of(tokenizer)
    rows, width = lengths.flatten(), int(lengths.max())
    place = torch.arange(width)[None, :]
    mask = place < rows[:, None]
    free = mask & (place >= len(frame.prefix)) & (place < rows[:, None] - len(frame.suffix))
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    ids[free] = 0
    for index, token in enumerate(frame.prefix):
        ids[:, index] = token
    for index, token in enumerate(reversed(frame.suffix)):
        ids[torch.arange(len(rows)), rows - 1 - index] = token
    noise = torch.randn((len(rows), width, table.shape[1]), generator=rng)
    noise = norm * noise / noise.norm(dim=2, keepdim=True)
    device = table.device
    ids, mask, free = ids.to(device), mask.long().to(device), free.to(device)
    embeddings = torch.where(free[:, :, None], noise.to(device, table.dtype), table[ids])
    wanted = torch.tensor(labels, dtype=torch.int64, device=device).repeat(len(lengths))
    return Guesses(embeddings, ids, mask, free, wanted, texts=lengths.shape[1])


def of_texts(rows: Sequence[Sequence[int]], label: int, width: int, *, table: Tensor, tokenizer: Any) -> Guesses:
    """Texts as messages of one each, at their own tokens' embeddings.

    Args:
        rows: token ids with special tokens, none longer than ``width``.
        label: class of all of them.
        width: tokens to pad to.
        table: (rows, d) token-embedding table.
        tokenizer: the public tokenizer.
    """
    frame: Frame = frame_of(tokenizer)
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    mask, free = torch.zeros((len(rows), width), dtype=torch.int64), torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row))
        mask[index, : len(row)] = 1
        free[index, len(frame.prefix) : len(row) - len(frame.suffix)] = True
    ids, mask, free = ids.to(table.device), mask.to(table.device), free.to(table.device)
    labels = torch.full((len(rows),), label, device=table.device)
    return Guesses(table[ids], ids.masked_fill(free, 0), mask, free, labels, texts=1)
