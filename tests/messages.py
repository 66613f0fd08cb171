"""Messages as an attacker sees them, made by the client itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine.client import Client
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.policy.table import Policy


def observe(
    model: LoadedModel,
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    tell: Sequence[str] = ("labels", "lengths"),
    public: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Observation, Batch]:
    """One message of some texts under a policy's rows, with what ``tell`` discloses; and the true batch."""
    plan = Policy(list(rows)).plan(slots(model.module))
    batch = collate(list(texts), list(labels), model.tokenizer)
    update = Client(model.module, plan, seed=seed).observe(batch)
    told = Disclosed(
        tokenizer=model.tokenizer,
        plan=plan,
        batch_size=update.batch_size,
        sequences=len(texts),
        public_texts=tuple(public),
        labels=tuple(labels) if "labels" in tell else None,
        lengths=tuple(int(n) for n in batch.attention_mask.sum(1)) if "lengths" in tell else None,
    )
    return Observation(update.tensors, model.module, told), batch


def shuffled(seen: Observation, seed: int = 0) -> Observation:
    """The same entries in a random order inside every tensor: nothing about the text is left."""
    source = torch.Generator().manual_seed(seed)
    mixed = {
        name: value.flatten()[torch.randperm(value.numel(), generator=source)].reshape(value.shape)
        for name, value in seen.message.items()
    }
    return replace(seen, message=mixed)


def noise(seen: Observation, seed: int = 0) -> Observation:
    """Gaussian noise of every tensor's own size."""
    source = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(v.shape, generator=source) * v.std(correction=0) for name, v in seen.message.items()}
    return replace(seen, message=drawn)


def contents(model: LoadedModel, ids: Sequence[int]) -> list[int]:
    """Token ids without special tokens."""
    special = set(model.tokenizer.all_special_ids)
    return [int(i) for i in ids if int(i) not in special]
