"""One client's part of one round: a pure function of the weights, the client's texts, the seeds and its own state.

The embedded engine and a federation on several machines both call `one_client_round`, so they send the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dpguard.engine import noise
from dpguard.engine.client import Client
from dpguard.engine.local import LocalState, LocalTraining
from dpguard.engine.update import Update
from dpguard.federation import personal
from dpguard.federation.settings import Settings, derive
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.texts import Example
from dpguard.policy.table import Plan


def client_batches(
    seed: int | None, client: int, round_: int, *, examples: int, batch_size: int, steps: int
) -> list[list[int]]:
    """Poisson batches of one client in one round: each of its texts joins each batch by its own coin.

    Args:
        seed: the federation's; None tosses coins that nobody can foresee (a deployment).
        client: from 0.
        round_: from 1.
        examples: N, how many texts the client has.
        batch_size: expected size b; the probability is b / N, at most 1.
        steps: how many batches.

    Returns:
        ``steps`` lists of indices below ``examples``, in increasing order; a list may be empty.

    >>> client_batches(0, 1, 1, examples=3, batch_size=8, steps=2)
    [[0, 1, 2], [0, 1, 2]]
    """
    coins = noise.source(None if seed is None else derive(seed, "batches", client, round_))
    rate = sampling_rate(batch_size, examples)
    return [(noise.uniform(examples, coins) < rate).nonzero()[:, 0].tolist() for _ in range(steps)]


def sampling_rate(batch_size: int, examples: int) -> float:
    """The probability that a text is in a batch: b / N, and 1 for a client with fewer texts than a batch."""
    return min(1.0, batch_size / examples)


def local_training(settings: Settings) -> LocalTraining:
    """The settings' local steps as the engine takes them."""
    return LocalTraining(
        settings.optimizer, settings.learning_rate, settings.momentum,
        keep_state=settings.keep_state, error_feedback=settings.error_feedback,
    )  # fmt: skip


def one_client_round(
    model: nn.Module,
    plan: Plan,
    texts: Sequence[Example],
    settings: Settings,
    *,
    tokenizer: Any,
    seed: int | None,
    client: int,
    round_: int,
    state: LocalState,
) -> Update:
    """What a client sends in a round.

    Args:
        model: at the global weights of the round; left as it was found.
        plan: the client's own, see `views.message_plan`.
        texts: the client's.
        settings: the federation.
        tokenizer: the model's.
        seed: the federation's; None = secret coins and noise, as in a deployment.
        client: from 0.
        round_: from 1; also the public seed of random pruning masks.
        state: what stays with the client between rounds; brought up to date in place.

    Returns:
        A gradient (``fedsgd``), else the change of the weights after the local steps. The divisor is the public
        batch size, also for a client with fewer texts than that: its message is as much smaller.
    """
    drawn = client_batches(
        seed, client, round_, examples=len(texts), batch_size=settings.batch_size, steps=settings.local_steps
    )
    batches = [_batch([texts[i] for i in rows], tokenizer) for rows in drawn]
    noise_seed = None if seed is None else derive(seed, "noise", client, round_)
    made = Client(
        model, plan,
        seed=noise_seed,
        batch_size=settings.batch_size,
        mode="train",
        mask_seed=round_,
        dropout_seed=None if seed is None else derive(seed, "dropout", client, round_),
        training=local_training(settings),
    )  # fmt: skip
    made.state = state
    if settings.kind == "gradient":
        return personal.gradient(made, batches[0], noise.source(noise_seed))
    return made.observe(batches)


def _batch(texts: Sequence[Example], tokenizer: Any) -> Batch:
    return collate([e.text for e in texts], [e.label for e in texts], tokenizer)
