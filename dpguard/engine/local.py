"""Local steps between two messages: the change of the weights, noised step by step or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from dpguard.engine import noise, wire
from dpguard.engine.modes.base import trained_parameters
from dpguard.errors import UserError, did_you_mean
from dpguard.inputs.batch import Batch
from dpguard.policy.columns import number

if TYPE_CHECKING:
    from dpguard.engine.client import Client

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adam": Adam}


@dataclass(frozen=True)
class LocalTraining:
    """What a client does between two messages. Public: the server and an attacker know it.

    With ``unit: example`` every step's gradient is clipped and noised before the optimizer sees it (each step
    counts as one message); with ``unit: update`` the steps are clean and the whole change is clipped and noised
    once. Pruning and quantising are done on the change, after the noise.

    Attributes:
        optimizer: ``sgd`` or ``adam``.
        learning_rate: of the local optimizer.
        momentum: of ``sgd``.
        keep_state: moments live on into the next round. Under ``unit: example`` they are moments of noised
            gradients, so they cost nothing.
        error_feedback: what pruning and quantising left of the NOISED change is added to the next one; the
            noise is in it already, so this too costs nothing.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    keep_state: bool = False
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {self.optimizer!r}{did_you_mean(self.optimizer, list(OPTIMIZERS))}")
        for name, bounds in (("learning_rate", {"above": 0.0}), ("momentum", {"most": 1.0})):
            try:
                number(getattr(self, name), **bounds)
            except UserError as error:
                raise UserError(f"{name} {error.sentence}") from None
        if self.momentum and self.optimizer != "sgd":
            raise UserError(f"momentum is {self.momentum:g} with optimizer {self.optimizer!r}; expected 'sgd'")

    def make(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """A fresh optimizer."""
        more: dict[str, Any] = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        return OPTIMIZERS[self.optimizer](parameters, lr=self.learning_rate, **more)


@dataclass
class LocalState:
    """What stays with a client between rounds; private.

    Attributes:
        personal: withheld trained tensor -> its weights at home.
        moments: the optimizer's state, when kept.
        residual: what release operations left out, under error feedback.
    """

    personal: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Any] | None = None
    residual: dict[str, Tensor] = field(default_factory=dict)


def delta(client: Client, batches: Sequence[Batch], drawn_from: noise.Source) -> dict[str, Tensor]:
    """Shared tensor -> change of its weights after a step on each batch, as it leaves.

    The model ends with the weights that it began with; withheld tensors go on from `LocalState.personal`.
    """
    plan, state = client.plan, client.state
    parameters = trained_parameters(client.model, plan)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    grads = {name: p.grad for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, value in state.personal.items():
                parameters[name].copy_(value)
        _steps(client, batches, parameters, drawn_from)
        change = {name: _wide(parameters[name].detach()) - _wide(before[name]) for name in plan.shared}
        state.personal = {name: parameters[name].detach().clone() for name in plan.withheld}
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
                parameters[name].grad = grads[name]
    return _released(client, change, drawn_from)


def _wide(value: Tensor) -> Tensor:
    return value.to(noise.wide(value.dtype))


def _steps(
    client: Client, batches: Sequence[Batch], parameters: dict[str, nn.Parameter], drawn_from: noise.Source
) -> None:
    training, state, plan = client.training, client.state, client.plan
    optimizer = training.make(parameters.values())
    if training.keep_state and state.moments is not None:
        optimizer.load_state_dict(state.moments)
    for step, batch in enumerate(batches):
        size = client.divisor(batch)
        clipped = client.clipped(batch, step=step)
        client.dropped = clipped.dropped
        for name, total in clipped.sums.items():
            rule = plan[name]
            std = 0.0 if rule.unit == "update" or not rule.noise else rule.std(size)
            mean = noise.add_noise_(total, std, drawn_from, divide_by=size)
            parameters[name].grad = mean.to(parameters[name].dtype)
        optimizer.step()
    if training.keep_state:
        state.moments = optimizer.state_dict()


def _released(client: Client, change: dict[str, Tensor], drawn_from: noise.Source) -> dict[str, Tensor]:
    """Whole-update clip and noise, uncalibrated noise, then pruning and quantising: all on the change itself."""
    plan, state = client.plan, client.state
    out = {}
    bounded = wire.clip_update(change, wire.shared_only(plan), 1)
    for name in plan.shared:
        rule = plan[name]
        std = rule.std(1) if rule.unit == "update" and rule.noise else rule.noise_std
        noised = noise.add_noise_(bounded[name].clone(), std, drawn_from) if std else bounded[name]
        if client.training.error_feedback and name in state.residual:
            noised = noised + state.residual[name]
        out[name] = wire.released_tensor(name, noised, plan, mask_seed=client.mask_seed)
        if client.training.error_feedback:
            state.residual[name] = noised - out[name]
    return out
