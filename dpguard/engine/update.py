"""What leaves a client, and the plain mean over several clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpguard.errors import UserError

if TYPE_CHECKING:
    from dpguard.engine.local import LocalTraining


@dataclass(frozen=True)
class Update:
    """What leaves the client, and nothing else: no norm, no count, no seed of the noise.

    Attributes:
        tensors: shared parameter name -> tensor on the wire.
        batch_size: the public batch size, the divisor.
        kind: ``gradient``: of one step; ``delta``: weights after some local steps minus weights before them.
        mode: ``eval`` (dropout off) or ``train``.
        mask_seed: public seed of random pruning masks.
        local_steps: how many steps a delta holds.
        training: how those were made (public), None for a gradient.
        clients: how many clients' updates were averaged.
    """

    tensors: dict[str, Tensor]
    batch_size: int
    kind: str = "gradient"
    mode: str = "eval"
    mask_seed: int = 0
    local_steps: int = 1
    training: LocalTraining | None = None
    clients: int = 1


def aggregate(updates: Sequence[Update]) -> Update:
    """The plain mean of several clients' updates: what a server sees through secure aggregation.

    An update that is a mean already counts for all of its clients.

    Args:
        updates: of the same kind, over the same tensors.

    Raises:
        UserError: none, or updates that do not belong together (their mean would be of nothing).

    >>> one, two = (Update({"w": torch.tensor([x])}, batch_size=4) for x in (1.0, 2.0))
    >>> aggregate([one, two]).tensors["w"]
    tensor([1.5000])
    """
    if not updates:
        raise UserError("aggregate got no update; expected at least one")
    first = updates[0]
    like = replace(first, tensors={}, clients=1)
    shapes = {name: value.shape for name, value in first.tensors.items()}
    for number, other in enumerate(updates[1:], start=2):
        if replace(other, tensors={}, clients=1) != like:
            raise UserError(f"update {number} is of another kind than the first; expected one kind, batch size and way")
        if {name: value.shape for name, value in other.tensors.items()} != shapes:
            raise UserError(f"update {number} holds other tensors than the first; expected one policy and one model")
    clients = sum(u.clients for u in updates)
    sums = {name: torch.stack([u.tensors[name] * u.clients for u in updates]).sum(0) for name in first.tensors}
    return replace(first, tensors={name: value / clients for name, value in sums.items()}, clients=clients)
