"""The server's step: from the clients' messages of a round to the next global weights.

A message holds what is shared and nothing else. It is merged into the CURRENT global weights, so what no client
shares stays as it is, whatever the messages leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpguard.engine.update import Update, aggregate
from dpguard.errors import UserError
from dpguard.federation.settings import Settings

BETAS = (0.9, 0.99)
TAU = 1e-3
"""Constants of FedAdam (Reddi et al., arXiv 2003.00295, section 5): decay of both moments, and adaptivity."""


@dataclass
class ServerState:
    """What the server keeps between rounds: FedAdam's moments, tensor by tensor. Made of messages alone, so public.

    Attributes:
        first: mean of the changes.
        second: mean of their squares, from tau^2 on.
    """

    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


def mean_update(updates: Sequence[Update], sizes: Sequence[int] | None = None) -> Update:
    """The mean over the clients of a round.

    Args:
        updates: one a client.
        sizes: PUBLIC number of texts of each client as weights; None = equal weights. Weights must not depend on
            anything private (a loss, a Poisson count): noise covers the tensors alone.

    Raises:
        UserError: messages that do not belong together, or not one size a message.
    """
    plain = aggregate(updates)
    if sizes is None:
        return plain
    if len(sizes) != len(updates) or min(sizes) < 1:
        raise UserError(f"{len(updates)} messages and the sizes {list(sizes)}; expected a size from 1 on for each")
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    tensors = {
        name: sum((share * u.tensors[name] for share, u in zip(shares.tolist(), updates, strict=True)), start=zero)
        for name, zero in ((name, torch.zeros_like(value)) for name, value in plain.tensors.items())
    }
    return Update(
        tensors, plain.batch_size, plain.kind, plain.mode, plain.mask_seed, plain.local_steps, plain.training,
        plain.clients,
    )  # fmt: skip


def server_step(
    weights: Mapping[str, Tensor],
    updates: Sequence[Update],
    settings: Settings,
    state: ServerState,
    *,
    sizes: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The next global weights.

    ``fedsgd``: w - rate * mean gradient. ``fedavg``: w + rate * mean change (McMahan et al., arXiv 1602.05629, with
    a server rate). ``fedadam``: w + rate * m / (sqrt(v) + tau) with the moments of the mean change (arXiv
    2003.00295, Algorithm 2). All of it is made of messages alone, so it costs no privacy.

    Args:
        weights: parameter name -> current global weights; all of them, not only the shared ones.
        updates: the messages of the round, or their one mean (secure aggregation).
        settings: the federation.
        state: FedAdam's moments, brought up to date in place.
        sizes: public numbers of texts, for ``weights: size``.

    Returns:
        Every name of ``weights``; new tensors for what was shared, the same ones for the rest.

    Raises:
        UserError: a message of the wrong kind, for an unknown tensor, or of another shape.
    """
    mean = mean_update(updates, sizes)
    if mean.kind != settings.kind:
        raise UserError(f"the messages are of kind {mean.kind!r}; expected {settings.kind!r} for {settings.server}")
    out = dict(weights)
    for name, value in mean.tensors.items():
        if name not in out or out[name].shape != value.shape:
            shape = tuple(out[name].shape) if name in out else "no such tensor"
            raise UserError(f"a message holds {name!r} of shape {tuple(value.shape)}; the global model has {shape}")
        out[name] = out[name] + _step(name, value, settings, state)
    return out


def _step(name: str, mean: Tensor, settings: Settings, state: ServerState) -> Tensor:
    rate = settings.server_rate
    if settings.server == "fedsgd":
        return -rate * mean
    if settings.server == "fedavg":
        return rate * mean
    first = BETAS[0] * state.first.get(name, torch.zeros_like(mean)) + (1 - BETAS[0]) * mean
    second = BETAS[1] * state.second.get(name, torch.full_like(mean, TAU**2)) + (1 - BETAS[1]) * mean**2
    state.first[name], state.second[name] = first, second
    return rate * first / (second.sqrt() + TAU)
