"""Candidate texts as token ids: batches of them, their evidence, and the proof that one is the message."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpguard.attacks.likelihood_channels import channels
from dpguard.attacks.likelihood_replay import Replay, Terms
from dpguard.attacks.observation import Observation
from dpguard.engine import wire
from dpguard.engine.gradients import gradient
from dpguard.inputs.batch import Batch

EXACT = 1e-4
"""Largest relative residual that float32 rounding explains."""
ENTRIES = 1000
"""Fewest entries that can prove a text without noise."""


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
    """Without noise: whether a text's own message is the one that was seen, on every tensor that can tell.

    Args:
        seen: the message.
        text: token ids with special tokens.
        label: class index.
    """
    told = seen.disclosed
    clean = {c.name: c for c in channels(seen)[0] if c.clean and told.plan[c.name].bits is None}
    if told.mode != "eval" or sum(int((c.value != 0).sum()) for c in clean.values()) < ENTRIES:
        return False
    model = Replay(seen).model.requires_grad_(True)
    found = gradient(model, batch_of([list(text)], label, told.tokenizer.pad_token_id), told.plan.trained)
    sums = wire.clip_update(
        wire.clip_and_sum({name: g[None] for name, g in found.items()}, told.plan).sums, told.plan, told.batch_size
    )
    for name, channel in clean.items():
        sent = sums[name] if channel.kept is None else sums[name] * channel.kept
        if not float((sent - channel.value).norm()) <= EXACT * float(channel.value.norm()):
            return False
    return True
