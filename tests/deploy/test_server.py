"""The server's side: partial messages, the steps of a training in one place, and messages that it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpguard.deploy import training
from dpguard.deploy.checks import Refused
from dpguard.deploy.server import Server
from dpguard.errors import UserError
from tests.deploy import cases


def started(name, **changes):
    made = cases.rehearsal(name)
    made = replace(made, message=replace(made.message, **changes))
    return made, training.first_weights(cases.model())


def message(made, weights, size):
    return {n: torch.full_like(weights[n], size) for n in made.plan.shared}


@pytest.mark.parametrize(("server", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_on_the_mean_gradient_is_the_optimizer_of_a_training_in_one_place(server, kind):
    made, weights = started("dp-sgd, gradients", server=server, server_rate=0.01)
    own = {n: torch.nn.Parameter(v.clone()) for n, v in weights.items()}
    optimizer, side = kind(own.values(), lr=0.01), Server(made)
    for step in (1.0, -3.0):
        weights = side.step(weights, [message(made, weights, step), message(made, weights, step + 1)])
        for parameter in own.values():
            parameter.grad = torch.full_like(parameter, step + 0.5)
        optimizer.step()
    assert all(torch.allclose(weights[n], p) for n, p in own.items())


def test_every_tensor_moves_by_the_mean_over_those_that_sent_it():
    made, weights = started("dp-sgd, differences")
    whole, part = message(made, weights, 1.0), message(made, weights, 3.0)
    left_out = made.plan.shared[0]
    del part[left_out]
    after = Server(made).step(weights, [whole, part])
    assert torch.allclose(after[left_out], weights[left_out] + 1.0)
    other = made.plan.shared[1]
    assert torch.allclose(after[other], weights[other] + 2.0)
    assert after.keys() == weights.keys()


def test_nothing_sent_changes_nothing():
    made, weights = started("dp-sgd, differences")
    after = Server(made).step(weights, [{}])
    assert all(after[n] is v for n, v in weights.items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m, frozen: m.update({frozen: next(iter(m.values()))}), "does not share"),
        (lambda m, frozen: m.update({k: v[..., :1] for k, v in list(m.items())[:1]}), "shape"),
        (lambda m, frozen: m.update({k: v * torch.nan for k, v in list(m.items())[:1]}), "finite"),
        (lambda m, frozen: m.update({k: v.half() for k, v in list(m.items())[:1]}), "type"),
    ],
)
def test_a_clients_message_that_is_none_is_refused(spoil, words):
    made, weights = started("per block, partial")
    sent = message(made, weights, 1.0)
    spoil(sent, next(n for n in weights if n not in made.plan.shared))
    with pytest.raises(Refused, match=words):
        Server(made).step(weights, [sent])


def test_an_unknown_step_is_a_mistake():
    made, _weights = started("dp-sgd, gradients", server="adan")
    with pytest.raises(UserError, match="did you mean 'adam'"):
        Server(made)
