"""Candidate texts as token ids: batches of them, their evidence, and the proof that one is the message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dpguard.attacks import match_proof
from dpguard.attacks.likelihood_replay import Replay, Terms, frozen_copy
from dpguard.attacks.observation import Observation
from dpguard.inputs.batch import Batch


def score(replay: Replay, texts: Sequence[Sequence[int]], label: int, padding: int) -> Terms:
    """Evidence about token-id rows of any lengths under one label, in the order given.

    Args:
        replay: the message.
        texts: token ids with special tokens.
        label: class index.
        padding: id of the padding token.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # neighbours of one length share a pass
    found = replay.terms(batch_of([texts[index] for index in order], label, padding))
    back = torch.tensor(order).argsort()
    return Terms(found.dots[:, back], found.squares[:, back])


def batch_of(texts: Sequence[Sequence[int]], label: int, padding: int) -> Batch:
    """Token-id rows as a batch, padded on the right."""
    width = max(len(row) for row in texts)
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in texts])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts])
    return Batch(ids, mask, torch.full((len(texts),), label))


def is_message(seen: Observation, text: Sequence[int], label: int) -> bool:
    """Whether a text is proven by the tensors without noise, see `match_proof`; on a private copy of the model.

    Args:
        seen: the message.
        text: token ids with special tokens.
        label: class index.
    """
    if not match_proof.provable(seen):
        return False  # spares the copy
    return match_proof.is_message(replace(seen, model=frozen_copy(seen.model, torch.float32)), text, label)
