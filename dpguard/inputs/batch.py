"""A batch of encoded texts: what a model is fed and what a client computes gradients of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Encoded texts, padded on the right.

    Attributes:
        input_ids: (B, L) int64 token ids.
        attention_mask: (B, L) int64, 1 for tokens.
        labels: (B,) int64 class indices; or (B, L) token ids with -100 where nothing is predicted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def rows(self, index: slice | Tensor) -> Batch:
        """The examples at ``index``, padding that nobody needs cut off."""
        mask = self.attention_mask[index]
        longest = max(1, int(mask.sum(1).max())) if len(mask) else mask.shape[1]
        labels = self.labels[index]
        return Batch(
            self.input_ids[index, :longest], mask[:, :longest], labels[:, :longest] if labels.dim() == 2 else labels
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(texts: Sequence[str], labels: Sequence[int], tokenizer: Any) -> Batch:
    """Encode texts with special tokens and pad them to the longest; an empty list gives a batch of 0 rows.

    Args:
        texts: B texts.
        labels: B class indices.
        tokenizer: Hugging Face tokenizer with a padding token.
    """
    if not texts:
        empty = torch.zeros((0, 1), dtype=torch.int64)
        return Batch(empty, empty.clone(), torch.zeros(0, dtype=torch.int64))
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    return Batch(encoded["input_ids"], encoded["attention_mask"], torch.tensor(list(labels), dtype=torch.int64))
