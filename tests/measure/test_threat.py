"""What the threat model's switches make of the same texts."""

from __future__ import annotations

import pytest
import torch

from dpguard.engine.client import Client
from dpguard.engine.update import aggregate
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.inputs.family import slots
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from tests import tiny


def _case(rows=()):
    model = tiny.loaded("bert")
    batches = [
        collate([text], [label], model.tokenizer) for text, label in zip(tiny.SENTENCES[:2], (1, 0), strict=True)
    ]
    return model, Policy(list(rows)).plan(slots(model.module)), batches


def test_the_default_is_the_gradient_that_a_client_sends() -> None:
    model, plan, batches = _case()
    sent = Threat().message(model, plan, batches[:1], noise_seed=3)
    own = Client(model.module, plan, seed=3).observe(batches[0])
    assert sent.kind == "gradient"
    assert all(torch.equal(sent.tensors[k], own.tensors[k]) for k in own.tensors)


def test_local_steps_give_the_change_of_the_weights() -> None:
    model, plan, batches = _case()
    gradient = Threat().message(model, plan, batches[:1], noise_seed=3)
    sent = Threat(local_steps=1, learning_rate=0.5).message(model, plan, batches[:1], noise_seed=3)
    assert (sent.kind, sent.local_steps, sent.training.learning_rate) == ("delta", 1, 0.5)
    for name, value in gradient.tensors.items():
        assert torch.allclose(sent.tensors[name], -0.5 * value, atol=1e-6), name


def test_clients_are_averaged_with_noise_of_their_own() -> None:
    model, plan, batches = _case([{"layers": "all", "clip": 1.0, "noise": 1.0}])
    sent = Threat(clients=2).message(model, plan, batches, noise_seed=3)
    alone = [Client(model.module, plan, seed=s).observe(b) for s, b in zip((3, 3 + 7_919), batches, strict=True)]
    assert sent.clients == 2
    mean = aggregate(alone).tensors
    assert all(torch.equal(sent.tensors[k], mean[k]) for k in mean)


def test_dropout_changes_the_message_and_follows_the_seed() -> None:
    model, plan, batches = _case()
    plain, one, same, other = (
        Threat(mode=mode).message(model, plan, batches[:1], noise_seed=seed).tensors
        for mode, seed in (("eval", 1), ("train", 1), ("train", 1), ("train", 2))
    )
    name = next(name for name in plain if "query.weight" in name)
    assert torch.equal(one[name], same[name])
    assert not torch.allclose(one[name], plain[name])
    assert not torch.allclose(one[name], other[name])


def test_labels_or_lengths_tell_the_count() -> None:
    assert Threat(know=("lengths",)).knows("count")
    assert not Threat(know=()).knows("count")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"know": ("label",)}, "labels"),
        ({"mode": "training"}, "train"),
        ({"clients": 0}, "clients are 0"),
        ({"local_steps": -1}, "local steps are -1"),
    ],
)
def test_a_wrong_switch_is_one_sentence(given, said) -> None:
    with pytest.raises(UserError, match=said):
        Threat(**given)
