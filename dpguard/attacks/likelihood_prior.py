"""What public text says about neighbouring tokens: log-probabilities of what follows and what precedes a token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from dpguard.attacks.language import Bigram, Corpus, bigram, content_ids
from dpguard.attacks.observation import Disclosed
from dpguard.attacks.vocabulary import allowed_tokens, frame_of, framed

UNSEEN = 0.02
"""Pseudo-count of a token that no public text holds, when tokens are drawn."""
NEVER = -1e9
MEMORY = 1 << 28
"""Bytes of rows that are kept, and as many of columns."""


class Neighbours:
    """A bigram model of the public texts, read row by row and column by column.

    Args:
        told: what the threat model discloses; all of its public texts are read.
        vocabulary: rows of the token-embedding table.
        longest: tokens that the model reads; longer public texts are left out (or cut, where all are longer).

    Attributes:
        frame: the special tokens around a text.
        rows: distinct public texts as token ids, special tokens included.
        allowed: (vocabulary,) bool, tokens that a text can hold.
        frequency: (vocabulary,) probabilities to draw a token from.
        log_frequency: (vocabulary,) their logarithms, `NEVER` where a text can't hold the token.
        seen: ids of the tokens that occur in public text.
    """

    def __init__(self, told: Disclosed, vocabulary: int, longest: int) -> None:
        corpus = Corpus(tuple(text for text in told.public_texts if text.strip()), told.tokenizer)
        self.frame = frame_of(told.tokenizer)
        rows = [tuple(self.frame.wrap(ids)) for ids in dict.fromkeys(content_ids(corpus)) if ids]
        self.rows = [row for row in rows if len(row) <= longest] or [
            tuple(framed(told.tokenizer, row, longest)) for row in rows
        ]
        self.allowed = allowed_tokens(told.tokenizer, vocabulary)
        tokens = torch.tensor([t for row in content_ids(corpus) for t in row], dtype=torch.int64)
        counts = torch.bincount(tokens, minlength=vocabulary).double() * self.allowed
        weights = counts + UNSEEN * self.allowed
        self.frequency = weights / weights.sum()
        self.log_frequency = self.frequency.clamp(min=1e-30).log().float().masked_fill(~self.allowed, NEVER)
        self.seen = (counts > 0).nonzero()[:, 0]
        found = bigram(corpus, vocabulary)
        self._model: Bigram = found if found is not None else Bigram([], vocabulary)
        order = (self._model.keys % vocabulary).argsort(stable=True)
        seconds = (self._model.keys % vocabulary)[order]
        kept = lru_cache(max(1, MEMORY // (4 * vocabulary)))
        self._after = kept(partial(_followers, self._model))  # no method: the rows go when this object goes
        self._before = kept(partial(_leaders, self._model, order, seconds))

    def after(self, token: int | None) -> Tensor:
        """(vocabulary,) float32 log P(. | token); the token frequencies at the start of an unframed text."""
        return self.log_frequency if token is None else self._after(token)

    def before(self, token: int | None) -> Tensor:
        """(vocabulary,) float32 log P(token | .); zeros at the end of an unframed text."""
        return torch.zeros(self._model.vocabulary) if token is None else self._before(token)

    def between(self, left: int | None, right: int | None) -> Tensor:
        """(vocabulary,) float32 log P(. | left) + log P(right | .), `NEVER` where a text can't hold the token."""
        return (self.after(left) + self.before(right)).masked_fill(~self.allowed, NEVER)

    def log_prior(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of each row (all of one length) given its first token, in nats."""
        ids = torch.tensor(rows)
        nats = self._model.loss(ids, torch.ones_like(ids)) * (ids.shape[1] - 1)
        return [-n for n in nats.tolist()]


def _followers(model: Bigram, token: int) -> Tensor:
    """(vocabulary,) log P(. | token)."""
    size = model.vocabulary
    ends = torch.searchsorted(model.keys, torch.tensor([token * size, (token + 1) * size]))
    inside = slice(int(ends[0]), int(ends[1]))
    p = model.strength * model.unigram
    p = p.index_add(0, model.keys[inside] % size, model.counts[inside].double())
    return (p / (model.first[token] + model.strength)).log().float()


def _leaders(model: Bigram, by_second: Tensor, seconds: Tensor, token: int) -> Tensor:
    """(vocabulary,) log P(token | .), from the pairs in the order of their second tokens."""
    ends = torch.searchsorted(seconds, torch.tensor([token, token + 1]))
    which = by_second[int(ends[0]) : int(ends[1])]
    p = (model.strength * model.unigram[token]).expand(model.vocabulary)
    p = p.index_add(0, model.keys[which] // model.vocabulary, model.counts[which].double())
    return (p / (model.first + model.strength)).log().float()
