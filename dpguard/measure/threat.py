"""The threat model of the leakage leg: what the server knows besides the message, and what the message is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.engine.client import Client
from dpguard.engine.local import LocalTraining
from dpguard.engine.update import Update, aggregate
from dpguard.errors import UserError, did_you_mean
from dpguard.inputs.batch import Batch
from dpguard.inputs.models import LoadedModel
from dpguard.policy.table import Plan

KNOWLEDGE = ("count", "labels", "lengths")
MODES = ("eval", "train")


@dataclass(frozen=True)
class Threat:
    """Switches of the threat model.

    Attributes:
        know: what is disclosed: ``count`` (how many texts a message holds), ``labels``, ``lengths`` (each of
            the last two tells the count too).
        mode: ``eval`` = the client ran without dropout, ``train`` = with it.
        local_steps: 0 = the message is a gradient; k = the change of the weights after k steps of plain SGD, all
            over the same texts.
        learning_rate: of those steps.
        clients: 1 = one client's message; n = the mean of n clients', with ``batch_size`` texts each.
        candidates: 0 = the open world; M = the text is one of M disclosed ones, the others public texts.

    >>> Threat(know=("labels",)).knows("count")
    True
    """

    know: tuple[str, ...] = ("count",)
    mode: str = "eval"
    local_steps: int = 0
    learning_rate: float = 1e-3
    clients: int = 1
    candidates: int = 0

    def __post_init__(self) -> None:
        for word in self.know:
            if word not in KNOWLEDGE:
                raise UserError(f"unknown knowledge {word!r}{did_you_mean(word, KNOWLEDGE)}")
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}{did_you_mean(self.mode, MODES)}")
        if self.local_steps < 0:
            raise UserError(f"local steps are {self.local_steps}, expected 0 (a gradient is sent) or more")
        if self.clients < 1:
            raise UserError(f"clients are {self.clients}, expected 1 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"the learning rate of local steps is {self.learning_rate:g}, expected one above 0")

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Threat:
        """From a cell's settings; what is missing has its default."""
        names = ("mode", "local_steps", "learning_rate", "clients", "candidates")
        given = {name: settings[name] for name in names if name in settings}
        return Threat(know=tuple(settings.get("know", ("count",))), **given)

    def knows(self, what: str) -> bool:
        """Whether something is disclosed."""
        return what in self.know or (what == "count" and bool(self.know))

    def disclosed_candidates(self, text: str, public: Sequence[str], seed: int) -> tuple[str, ...]:
        """The closed world of one text: it and other public texts, shuffled; empty in the open world.

        Args:
            text: the true one.
            public: where the others come from.
            seed: of the choice and the order.

        Raises:
            UserError: too few public texts.

        >>> sorted(Threat(candidates=3).disclosed_candidates("b", ["a", "b", "c"], 0))
        ['a', 'b', 'c']
        """
        if not self.candidates:
            return ()
        others = [other for other in dict.fromkeys(public) if other != text]
        if len(others) < self.candidates - 1:
            raise UserError(
                f"a closed world of {self.candidates} takes {self.candidates - 1} other public texts, "
                f"expected at most {len(others) + 1} candidates"
            )
        source = random.Random(f"{seed}:candidates")
        chosen = [*source.sample(others, self.candidates - 1), text]
        source.shuffle(chosen)
        return tuple(chosen)

    def linear(self) -> Threat:
        """The same threat, or where local steps rescale their noise one whose steps add it up: for `defence`."""
        return self

    def message(
        self,
        model: LoadedModel,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        noise_seed: int | None,
        texts: bool = True,
    ) -> Update:
        """What the server receives of these batches, one a client.

        Args:
            model: at the weights that the clients use.
            plan: the policy.
            batches: `clients` of them.
            noise_seed: of the first client's noise; the next has the next one. None draws from the secure source.
            texts: False = every batch as it would be had no text been drawn; all else stays, the divisor too.
        """
        sent = []
        for number, batch in enumerate(batches):
            seed = None if noise_seed is None else noise_seed + 7_919 * number
            client = Client(
                model.module, plan, seed=seed, batch_size=len(batch), mode=self.mode, dropout_seed=(seed or 0) + 1,
                training=LocalTraining("sgd", learning_rate=self.learning_rate),
            )  # fmt: skip
            drawn = batch if texts else batch.rows(slice(0, 0))
            sent.append(client.observe([drawn] * self.local_steps if self.local_steps else drawn))
        return aggregate(sent) if len(sent) > 1 else sent[0]
