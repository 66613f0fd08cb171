"""The server's side of an exported federation: partial messages merged into the current global weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from dpguard.deploy.checks import Refused, check_tensor
from dpguard.deploy.rehearsal import Rehearsal
from dpguard.engine.update import Update
from dpguard.errors import UserError, did_you_mean
from dpguard.federation.server import ServerState, server_step
from dpguard.federation.settings import SERVERS, Settings

CENTRAL = {"adam": Adam, "adamw": AdamW}
"""Optimizers of a training in one place, on the mean gradient of the clients."""


class Server:
    """What the server does with a round's messages. It sees nothing but them, so it costs no privacy.

    Args:
        rehearsal: what was rehearsed.

    Raises:
        UserError: a server step that is not known.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        form = rehearsal.message
        known = (*SERVERS, *CENTRAL)
        if form.server not in known:
            raise UserError(f"unknown server step {form.server!r}{did_you_mean(form.server, known)}")
        self._state = ServerState()
        self._optimizer: tuple[dict[str, torch.nn.Parameter], Optimizer] | None = None

    def step(self, weights: Mapping[str, Tensor], messages: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The next global weights.

        Every tensor moves by the mean over the clients that sent it (a site with a stricter table sends fewer);
        tensors that nobody sent stay as they are. Clients count equally: weights by private counts would leak them.

        Args:
            weights: every parameter, now.
            messages: of the round, one a client.

        Raises:
            Refused: a tensor that is not shared, of another shape or type, or not finite.
        """
        shared = set(self.rehearsal.plan.shared)
        for message in messages:
            for name, value in message.items():
                if name not in shared:
                    raise Refused(f"a client sent {name!r}, which the table does not share; expected shared tensors")
                check_tensor(name, value, weights[name].shape, weights[name].dtype)
        mean = {}
        for name in self.rehearsal.plan.shared:
            found = [message[name] for message in messages if name in message]
            if found:
                mean[name] = torch.stack(found).mean(0)
        return self._step(weights, mean) if mean else dict(weights)

    def _step(self, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        form = self.rehearsal.message
        if form.server in CENTRAL:
            return self._central(weights, mean)
        settings = Settings(
            clients=1, per_round=1, rounds=1, server=form.server, server_learning_rate=form.server_rate,
            learning_rate=form.learning_rate, batch_size=form.batch_size,
        )  # fmt: skip
        return server_step(weights, [Update(dict(mean), form.batch_size, form.kind)], settings, self._state)

    def _central(self, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        form = self.rehearsal.message
        if self._optimizer is None:
            own = {name: torch.nn.Parameter(weights[name].clone()) for name in self.rehearsal.plan.shared}
            self._optimizer = own, CENTRAL[form.server](own.values(), lr=form.server_rate)
        own, optimizer = self._optimizer
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        for name, parameter in own.items():
            parameter.grad = mean.get(name)
        optimizer.step()
        return {**weights, **{name: own[name].detach().clone() for name in mean}}
