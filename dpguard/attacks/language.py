"""What public text says about texts of the same kind: their tokens, lengths, and a bigram model.

Fits are kept for the last few sets of public texts, because a study asks hundreds of times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.observation import Disclosed
from dpguard.attacks.vocabulary import frame_of

LIMIT = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """Public texts together with the tokenizer that reads them; equal when both are the same.

    Attributes:
        texts: at most `LIMIT` texts, evenly spaced over what was disclosed.
        tokenizer: the public tokenizer.
    """

    texts: tuple[str, ...]
    tokenizer: Any

    def __hash__(self) -> int:
        return hash((self.texts, id(self.tokenizer)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Corpus) and self.tokenizer is other.tokenizer and self.texts == other.texts

    @staticmethod
    def of(disclosed: Disclosed) -> Corpus:
        """The public texts that the threat model gives away."""
        texts = disclosed.public_texts
        stride = max(1, -(-len(texts) // LIMIT))
        return Corpus(tuple(text for text in texts[::stride] if text.strip()), disclosed.tokenizer)


@lru_cache(maxsize=4)
def content_ids(corpus: Corpus) -> tuple[tuple[int, ...], ...]:
    """Token ids of every public text, without special tokens."""
    if not corpus.texts:
        return ()
    encoded = corpus.tokenizer(list(corpus.texts), add_special_tokens=False)["input_ids"]
    return tuple(tuple(ids) for ids in encoded)


@lru_cache(maxsize=4)
def public_lengths(corpus: Corpus) -> tuple[int, ...]:
    """Token counts of the public texts, special tokens included."""
    size = frame_of(corpus.tokenizer).size
    return tuple(len(ids) + size for ids in content_ids(corpus))


class Bigram:
    """Interpolated bigram model over token ids: P(b | a) = (c(ab) + k P(b)) / (c(a) + k).

    Args:
        sequences: token ids of texts, special tokens included.
        vocabulary: number of token ids.
        strength: k, how many pseudo-counts the unigram model is worth.
    """

    def __init__(self, sequences: list[list[int]], vocabulary: int, strength: float = 5.0) -> None:
        self.vocabulary, self.strength = vocabulary, strength
        tokens = torch.tensor([t for ids in sequences for t in ids], dtype=torch.int64)
        firsts = torch.tensor([t for ids in sequences for t in ids[:-1]], dtype=torch.int64)
        seconds = torch.tensor([t for ids in sequences for t in ids[1:]], dtype=torch.int64)
        unigrams = torch.bincount(tokens, minlength=vocabulary).double()
        self.unigram = (unigrams + 1) / (unigrams.sum() + vocabulary)
        self.first = torch.bincount(firsts, minlength=vocabulary).double()
        self.keys, self.counts = torch.unique(firsts * vocabulary + seconds, return_counts=True)

    def loss(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean negative log-likelihood (nats a token) of each row, given its first token.

        Args:
            ids: (N, L) token ids.
            mask: (N, L), 1 for tokens.

        Returns:
            (N,) float64.
        """
        first, second = ids[:, :-1].cpu(), ids[:, 1:].cpu()
        inside = mask[:, 1:].cpu().double()
        key = first * self.vocabulary + second
        place = torch.searchsorted(self.keys, key).clamp(max=max(len(self.keys) - 1, 0))
        seen = self.counts[place] * (self.keys[place] == key) if len(self.keys) else torch.zeros_like(key)
        p = (seen + self.strength * self.unigram[second]) / (self.first[first] + self.strength)
        return -(p.log() * inside).sum(1) / inside.sum(1).clamp(min=1)


@lru_cache(maxsize=4)
def bigram(corpus: Corpus, vocabulary: int) -> Bigram | None:
    """The bigram model of public texts, or None when there are none."""
    frame = frame_of(corpus.tokenizer)
    sequences = [frame.wrap(ids) for ids in content_ids(corpus)]
    return Bigram(sequences, vocabulary) if sequences else None
