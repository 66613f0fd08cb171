"""Layers that stay at home: each client goes on from its own, and the global model never sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpguard.engine import noise
from dpguard.engine.client import Client
from dpguard.engine.update import Update
from dpguard.inputs.batch import Batch
from dpguard.policy.table import Plan


def frozen_at_home(plan: Plan) -> Plan:
    """The plan with every withheld layer frozen: nothing is trained that is not shared."""
    withheld = set(plan.withheld)
    return replace(plan, rules={n: replace(r, train=False) if n in withheld else r for n, r in plan.items()})


@contextmanager
def at_home(model: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with a client's own layers in it, and the global ones back afterwards.

    Args:
        model: at the global weights.
        own: withheld tensor -> the client's weights (`LocalState.personal`).
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in own}
    try:
        _set(parameters, own)
        yield
    finally:
        _set(parameters, before)


def gradient(client: Client, batch: Batch, drawn_from: noise.Source) -> Update:
    """The gradient message of a client, taken at the global weights with its own layers in place.

    Its withheld layers then make one step of their own, by their clipped and noised gradient: all that the next
    message can depend on.
    """
    with at_home(client.model, client.state.personal):
        message = client.message(batch, drawn_from)
        divisor, rate = client.divisor(batch), client.training.learning_rate
        parameters = dict(client.model.named_parameters())
        client.state.personal = {
            name: parameters[name].detach() - rate * (message.noised[name] / divisor).to(parameters[name].dtype)
            for name in client.plan.withheld
        }
    return Update(message.wire, divisor, mode=client.mode, mask_seed=client.mask_seed)


def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
