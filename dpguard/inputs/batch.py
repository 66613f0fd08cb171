"""A batch of encoded texts: what a model is fed and what a client computes gradients of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpguard.errors import UserError


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

    @staticmethod
    def of(value: object) -> Batch:
        """A batch as it is, or from a mapping with input_ids, labels and maybe attention_mask, as loaders give it.

        Raises:
            UserError: anything else.
        """
        if isinstance(value, Batch):
            return value
        if isinstance(value, Mapping) and {"input_ids", "labels"} <= set(value):
            ids: Tensor = value["input_ids"]
            mask = value.get("attention_mask")
            return Batch(ids, torch.ones_like(ids) if mask is None else mask, value["labels"])
        raise UserError(
            f"a batch is a {type(value).__name__}; expected a Batch (dpguard.inputs.batch.collate makes one) or "
            "a mapping with input_ids, attention_mask and labels"
        )

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
