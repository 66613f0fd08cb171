"""The embedded federation: every client, the server and all rounds in one process, by the functions that a federation
on several machines calls (`turn.one_client_round`, `server.server_step`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine.local import LocalState
from dpguard.engine.update import Update
from dpguard.federation import bytes as wire_bytes
from dpguard.federation import views
from dpguard.federation.server import ServerState, server_step
from dpguard.federation.settings import Settings, rounds_of, who_takes_part
from dpguard.federation.split import Parts
from dpguard.federation.turn import one_client_round
from dpguard.inputs.texts import Example
from dpguard.policy.ledger import Ledger
from dpguard.policy.table import Plan

Weights = dict[str, Tensor]
OnRound = Callable[[int, int], None]
Perform = Callable[[int, tuple[int, ...], Mapping[str, Tensor]], list[Update]]
OnWeights = Callable[[int, Mapping[str, Tensor], Sequence[LocalState]], None]


@dataclass(frozen=True)
class Run:
    """What a federation leaves.

    Attributes:
        weights: parameter name -> last global weights.
        states: for every client what stayed at home.
        ledgers: for every client what it has spent.
        taken: for every client in how many rounds it took part.
        bytes: for every round what its clients sent, together.
        seconds: wall time.
    """

    weights: Weights
    states: tuple[LocalState, ...]
    ledgers: tuple[Ledger, ...]
    taken: tuple[int, ...]
    bytes: tuple[int, ...]
    seconds: float = field(compare=False)

    def epsilons(self) -> list[float]:
        """Every client's joint epsilon at its ledger's delta; 0 for one that never took part."""
        return [ledger.epsilon() for ledger in self.ledgers]


def run(
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Example],
    parts: Parts,
    plan: Plan,
    settings: Settings,
    *,
    seed: int,
    delta: float = 1e-5,
    on_round: OnRound = lambda done, total: None,
    on_weights: OnWeights = lambda round_, weights, states: None,
    perform: Perform | None = None,
) -> Run:
    """Train ``model`` in place, round by round.

    Args:
        model: the classifier; ends with the last global weights.
        tokenizer: its tokenizer.
        train: all training texts.
        parts: whose they are, see `split.split`.
        plan: the policy resolved against the model.
        settings: the federation.
        seed: of who takes part, batches, dropout and noise (a study's; a deployment has none).
        delta: of the ledgers.
        on_round: called with (rounds done, rounds in all).
        on_weights: called before every round with its number, the global weights that its clients start from, and what
            every client has at home by then.
        perform: (round, its clients, global weights) -> their messages in that order, from wherever the clients are;
            None = here. ``states`` then stay empty: what is at home stays there.

    Raises:
        UserError: see `views.check`.
    """
    views.check(plan, settings)
    started = time.perf_counter()
    own = views.message_plan(plan, settings)
    books = _Books(plan, settings, parts, delta, rounds_of(settings, seed))
    states = tuple(LocalState() for _ in range(settings.clients))
    texts = [[train[i] for i in part] for part in parts]
    sent, memory = [], ServerState()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def here(round_: int, client: int) -> Update:
        books.enter([client])
        return one_client_round(
            model, own, texts[client], settings,
            tokenizer=tokenizer, seed=seed, client=client, round_=round_, state=states[client],
        )  # fmt: skip

    for round_ in range(1, settings.rounds + 1):
        on_weights(round_, weights, states)
        chosen = who_takes_part(seed, round_, clients=settings.clients, per_round=settings.per_round)
        if perform is None:
            updates = [here(round_, client) for client in chosen]
        else:
            books.enter(chosen)
            updates = perform(round_, chosen, weights)
        sent.append(sum(wire_bytes.message_bytes(update.tensors, own) for update in updates))
        sizes = [len(parts[client]) for client in chosen] if settings.weights == "size" else None
        weights = server_step(weights, updates, settings, memory, sizes=sizes)
        set_weights(model, weights)
        on_round(round_, settings.rounds)
    model.eval()
    return Run(weights, states, books.ledgers, tuple(books.taken), tuple(sent), time.perf_counter() - started)


class _Books:
    """Every client's ledger, entered before its messages are made."""

    def __init__(self, plan: Plan, settings: Settings, parts: Parts, delta: float, planned: Sequence[int]) -> None:
        self._mechanisms = [
            views.mechanism(plan, settings, len(part), taken) for part, taken in zip(parts, planned, strict=True)
        ]
        self._messages = views.messages_a_round(plan, settings)
        self.ledgers = tuple(Ledger(f"client {k}", plan.hash, delta) for k in range(settings.clients))
        self.taken = [0] * settings.clients

    def enter(self, clients: Sequence[int]) -> None:
        """These clients take part in one more round."""
        for k in clients:
            first = self.taken[k] * self._messages + 1
            self.ledgers[k].spend(self._mechanisms[k], ("rounds", first), count=self._messages)
            self.taken[k] += 1


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model; names that are not given stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
