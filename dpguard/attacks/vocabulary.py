"""What the tokenizer alone says: the special tokens around a text, and which tokens a text can hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_UNUSED = re.compile(r"^\[unused\d+\]$")


@dataclass(frozen=True)
class Frame:
    """Special tokens that the tokenizer puts around every text, e.g. [CLS] and [SEP].

    >>> Frame((101,), (102,)).wrap([7, 8])
    [101, 7, 8, 102]
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many special tokens a text gets."""
        return len(self.prefix) + len(self.suffix)

    def wrap(self, content: Sequence[int]) -> list[int]:
        """Token ids of a text with its special tokens."""
        return [*self.prefix, *content, *self.suffix]


def frame_of(tokenizer: Any) -> Frame:
    """The frame of a tokenizer, read off one encoded word."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    content = [index for index, mark in enumerate(special) if not mark] or [len(ids)]
    return Frame(tuple(ids[: content[0]]), tuple(ids[content[-1] + 1 :]))


def framed(tokenizer: Any, text: Sequence[int], most: int) -> list[int]:
    """A proposed text with its special tokens, cut to ``most`` tokens; empty where it holds no word.

    Args:
        tokenizer: the public tokenizer.
        text: token ids, special tokens included or not.
        most: tokens that the model reads.
    """
    frame, inner = frame_of(tokenizer), content(tokenizer, text)
    return frame.wrap(inner[: most - frame.size]) if inner else []


def content(tokenizer: Any, text: Sequence[int]) -> list[int]:
    """A text without its special tokens; a word that the vocabulary lacks is a word of the text."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [int(token) for token in text if int(token) not in special]


def allowed_tokens(tokenizer: Any, rows: int, *, unknown: bool = False) -> Tensor:
    """(rows,) bool: tokens that a text can contain; special, unused and unnamed rows of the table are out.

    Args:
        tokenizer: the public tokenizer.
        rows: rows of the model's token-embedding table (often more than there are tokens).
        unknown: with what the tokenizer makes of a word that it cannot spell.
    """
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} if unknown else set())
    found = [
        index
        for token, index in tokenizer.get_vocab().items()
        if index < rows and index not in special and not _UNUSED.match(token)
    ]
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[torch.tensor(found, dtype=torch.int64)] = True
    return allowed


class TokenTable:
    """Nearest tokens by cosine, among those that a text can contain.

    Args:
        weight: (rows, d) token-embedding table.
        tokenizer: the public tokenizer.
    """

    def __init__(self, weight: Tensor, tokenizer: Any) -> None:
        self.weight = weight.detach()
        self.tokens = allowed_tokens(tokenizer, len(weight)).nonzero().flatten().to(weight.device)
        self.directions = torch.nn.functional.normalize(self.weight[self.tokens].float(), dim=1)

    @property
    def mean_norm(self) -> float:
        """Mean L2 norm of an embedding."""
        return float(self.weight[self.tokens].float().norm(dim=1).mean())

    def nearest(self, embeddings: Tensor, count: int = 1) -> Tensor:
        """(..., count) token ids, nearest first.

        Args:
            embeddings: (..., d).
            count: how many; at most the number of allowed tokens.
        """
        similarity = torch.nn.functional.normalize(embeddings.detach().float(), dim=-1) @ self.directions.T
        return self.tokens[similarity.topk(min(count, len(self.tokens)), dim=-1).indices]
