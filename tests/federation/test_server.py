from __future__ import annotations

import pytest
import torch

from dpguard.engine.update import Update
from dpguard.errors import UserError
from dpguard.federation.server import ServerState, mean_update, server_step
from dpguard.federation.settings import Settings

WEIGHTS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}


def updates(*values, kind="delta", name="a"):
    return [Update({name: torch.tensor(v)}, batch_size=4, kind=kind) for v in values]


def settings(**more):
    return Settings(clients=4, per_round=2, rounds=3, **more)


def test_what_no_message_holds_stays():
    found = server_step(WEIGHTS, updates([1.0, 0.0], [3.0, 2.0]), settings(), ServerState())
    assert found["a"].tolist() == [3.0, 3.0]
    assert found["b"] is WEIGHTS["b"]
    assert WEIGHTS["a"].tolist() == [1.0, 2.0]


def test_fedsgd_steps_against_the_mean_gradient():
    sent = updates([1.0, 0.0], [3.0, 2.0], kind="gradient")
    found = server_step(WEIGHTS, sent, settings(server="fedsgd", learning_rate=0.5), ServerState())
    assert found["a"].tolist() == [0.0, 1.5]


def test_public_sizes_weigh_the_mean():
    sent = updates([1.0, 0.0], [3.0, 2.0])
    assert mean_update(sent, [3, 1]).tensors["a"].tolist() == [1.5, 0.5]
    assert mean_update(sent).tensors["a"].tolist() == [2.0, 1.0]
    with pytest.raises(UserError, match="a size from 1 on for each"):
        mean_update(sent, [3])


def test_fedadam_is_the_papers_recursion():
    chosen, state, weights = settings(server="fedadam", server_learning_rate=0.1), ServerState(), WEIGHTS
    first = second = None
    expected = WEIGHTS["a"].double()
    for values in ([1.0, -2.0], [0.5, 1.0], [0.0, 3.0]):
        weights = server_step(weights, updates(values), chosen, state)
        change = torch.tensor(values, dtype=torch.float64)
        first = 0.1 * change if first is None else 0.9 * first + 0.1 * change
        second = 0.99 * (1e-6 if second is None else second) + 0.01 * change**2
        expected = expected + 0.1 * first / (second.sqrt() + 1e-3)
        assert torch.allclose(weights["a"].double(), expected, rtol=1e-5)


def test_messages_that_do_not_fit_are_refused():
    for sent, words in (
        (updates([1.0, 0.0], kind="gradient"), "of kind 'gradient'; expected 'delta'"),
        (updates([1.0, 0.0], name="c"), "no such tensor"),
        (updates([1.0]), r"of shape \(1,\)"),
        ([], "no update"),
    ):
        with pytest.raises(UserError, match=words):
            server_step(WEIGHTS, sent, settings(), ServerState())
