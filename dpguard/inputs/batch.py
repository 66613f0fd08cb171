"""A batch of encoded texts: what a model is fed and what a client computes gradients of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpguard.errors import UserError
from dpguard.inputs.texts import too_long


@dataclass(frozen=True)
class Batch:
    """Encoded texts, padded; on the right, where the model is an encoder.

    Attributes:
        input_ids: (B, L) int64 token ids.
        attention_mask: (B, L) int64, 1 for tokens.
        labels: (B,) int64 class indices; or (B, L) token ids with -100 where nothing is predicted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @staticmethod
    def of(value: object, padding: int | None = None) -> Batch:
        """A batch as it is, or from a mapping with input_ids, labels and maybe attention_mask, as loaders give it.

        Args:
            value: the batch.
            padding: the model's padding token.

        Raises:
            UserError: anything else, or no mask where one is needed (`mask_of`).
        """
        if isinstance(value, Batch):
            return value
        if isinstance(value, Mapping) and {"input_ids", "labels"} <= set(value):
            ids: Tensor = value["input_ids"]
            mask = value.get("attention_mask")
            return Batch(ids, mask_of(ids, padding) if mask is None else mask, value["labels"])
        raise UserError(
            f"a batch is a {type(value).__name__}; expected a Batch (dpguard.inputs.batch.collate makes one) or "
            "a mapping with input_ids, attention_mask and labels"
        )

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def rows(self, index: slice | Tensor) -> Batch:
        """The examples at ``index``, padding that nobody needs cut off, on either side."""
        mask, labels = self.attention_mask[index], self.labels[index]
        used = mask.any(0).nonzero()[:, 0].tolist() or [0]
        kept = slice(used[0], used[-1] + 1) if len(mask) else slice(None)
        return Batch(self.input_ids[index, kept], mask[:, kept], labels[:, kept] if labels.dim() == 2 else labels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def mask_of(ids: Tensor | None, padding: int | None) -> Tensor:
    """The mask of a batch that came without one: all ones, where there is no padding.

    Texts attend to padding that no mask hides, so the longest one would change every other's gradient.

    Args:
        ids: (B, L) token ids, or None where embeddings were given.
        padding: the model's padding token.

    Raises:
        UserError: padded, or it cannot be told.
    """
    if ids is None or (len(ids) > 1 if padding is None else bool(ids.eq(padding).any())):
        raise UserError(
            "a batch without attention_mask has padding, or may have; expected the tokenizer's attention_mask, because "
            "texts that attend to padding change with the longest text of the batch"
        )
    return torch.ones_like(ids)


def check_batch(batch: Batch, config: Any, most: int) -> None:
    """Refuse what the model has no row for.

    Args:
        batch: B examples.
        config: the model's configuration.
        most: tokens that a text may have.

    Raises:
        UserError: a text that is too long, or a label that is no class.
    """
    if len(batch) == 0:
        return
    longest = int(batch.attention_mask.sum(1).max())
    if longest > most:
        raise UserError(too_long(longest, most))
    classes = getattr(config, "num_labels", None)
    if batch.labels.dim() == 1 and classes and not bool(((batch.labels >= 0) & (batch.labels < classes)).all()):
        strange = int(batch.labels[(batch.labels < 0) | (batch.labels >= classes)][0])
        raise UserError(f"label {strange} is no class of the model; expected 0 to {classes - 1}")


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
