"""What a federation is: its numbers, checked against each other, and the seeds of everything random in it. No torch.

Everything random has a seed of its own, derived from (study seed, what, client, round), so that one client's part of
one round comes out the same in one process and on machines of their own.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dpguard.errors import UserError, did_you_mean

VIEWS = ("client", "aggregate")
SERVERS = ("fedsgd", "fedavg", "fedadam")
WEIGHTS = ("equal", "size")
PERSONAL = ("trained", "frozen")
SPLITS = ("iid", "dirichlet", "column")
OPTIMIZERS = ("sgd", "adam")
ENGINES = ("embedded", "flower")
_CHOICES = {"view": VIEWS, "server": SERVERS, "weights": WEIGHTS, "personal": PERSONAL, "optimizer": OPTIMIZERS,
            "engine": ENGINES}  # fmt: skip
_COUNTS = ("clients", "per_round", "rounds", "local_steps", "batch_size")


@dataclass(frozen=True)
class Split:
    """How texts go to clients.

    Attributes:
        kind: ``iid``, ``dirichlet`` or ``column``.
        concentration: of the Dirichlet distribution over labels; small = every client has few labels.
        column: the column whose value says whose text it is.
    """

    kind: str
    concentration: float = 0.0
    column: str = ""

    @staticmethod
    def parse(text: str) -> Split:
        """``iid``, ``dirichlet(0.5)`` or ``column(hospital)``.

        Raises:
            UserError: anything else.

        >>> Split.parse("dirichlet(.5)").concentration, Split.parse("column(hospital)").column
        (0.5, 'hospital')
        """
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(.+?)\s*\))?\s*", text)
        kind, argument = (found.group(1), found.group(2)) if found else ("", None)
        if kind == "iid" and argument is None:
            return Split("iid")
        if kind == "column" and argument:
            return Split("column", column=argument)
        if kind == "dirichlet" and argument:
            try:
                concentration = float(argument)
            except ValueError:
                concentration = math.nan
            if 0 < concentration < math.inf:
                return Split("dirichlet", concentration)
            raise UserError(f"the concentration of {text!r} is no number above 0; expected one, as in dirichlet(0.5)")
        hint = did_you_mean(kind, SPLITS) if kind not in SPLITS else ""
        near = hint if hint.startswith("; did") else ""
        raise UserError(f"unknown split {text!r}; expected iid, dirichlet(0.5) or column(name){near}")


@dataclass(frozen=True)
class Settings:
    """A federation. Public: every client, the server and an attacker know it.

    Attributes:
        clients: how many there are.
        per_round: how many of them take part in a round.
        rounds: how many rounds.
        local_steps: steps that a client makes in a round, each on a Poisson batch of its own.
        split: how the training texts go to the clients, see `Split.parse`.
        split_seed: of the split; public, one split for all seeds of a study.
        view: ``client``: the server sees each client's message; ``aggregate``: only their mean (secure aggregation).
        may_fail: clients of a round that may drop out or collude without weakening the guarantee (``aggregate``).
        server: ``fedsgd`` (mean of gradients), ``fedavg`` (mean of changes) or ``fedadam`` (Adam on that mean).
        server_learning_rate: of the server's step; None = the server's default, see `server_rate`.
        weights: of the clients in the mean: ``equal``, or by the ``size`` of their data, which is public then.
        batch_size: expected size of a Poisson batch, and the public divisor of every client.
        learning_rate: of the local steps.
        optimizer: of the local steps.
        momentum: of local ``sgd``.
        keep_state: a client's moments live on into its next round.
        error_feedback: what pruning and quantising left out is added to the client's next message.
        personal: withheld layers are ``trained`` at home, or ``frozen``.
        observe: rounds at which one and the same record is attacked (``leakage.at: rounds``).
        engine: ``embedded`` (one process) or ``flower`` (Flower's simulation); they give the same weights.

    >>> Settings(clients=4, per_round=2, rounds=3).server_rate
    1.0
    """

    clients: int
    per_round: int
    rounds: int
    local_steps: int = 1
    split: str = "iid"
    split_seed: int = 0
    view: str = "client"
    may_fail: int = 0
    server: str = "fedavg"
    server_learning_rate: float | None = None
    weights: str = "equal"
    batch_size: int = 32
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.0
    keep_state: bool = False
    error_feedback: bool = False
    personal: str = "trained"
    observe: tuple[int, ...] = ()
    engine: str = "embedded"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name}: unknown value {value!r}{did_you_mean(str(value), known)}", loc=(name,))
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}; expected a whole number above 0", loc=(name,))
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        try:
            Split.parse(self.split)
        except UserError as error:
            raise UserError(f"split: {error.sentence}", loc=("split",)) from None
        rates = {"learning_rate": self.learning_rate, "server_learning_rate": self.server_learning_rate}
        for name, value in rates.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}; expected a number above 0", loc=(name,))
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum!r}; expected a number from 0 up to 1", loc=("momentum",))
        if self.per_round > self.clients:
            raise UserError(
                f"per_round: {self.per_round} is more than the {self.clients} clients, expected at most {self.clients}",
                loc=("per_round",),
            )
        for place, number in enumerate(self.observe):
            if not 1 <= number <= self.rounds:
                raise UserError(
                    f"observe: round {number} is not one of the {self.rounds} rounds, expected 1 to {self.rounds}",
                    loc=("observe", place),
                )

    def _check_together(self) -> None:
        if self.server == "fedsgd":
            given = {
                "local_steps": self.local_steps > 1, "optimizer": self.optimizer != "sgd",
                "momentum": self.momentum > 0, "keep_state": self.keep_state, "error_feedback": self.error_feedback,
            }  # fmt: skip
            for name in (name for name, set_ in given.items() if set_):
                raise UserError(
                    f"{name}: fedsgd sends the gradient of one batch, so there are no local steps to set up; expected "
                    "server: fedavg, or fedadam",
                    loc=(name,),
                )
        if self.momentum and self.optimizer != "sgd":
            raise UserError("momentum: adam has moments of its own, expected optimizer: sgd", loc=("momentum",))
        if self.keep_state and self.optimizer == "sgd" and not self.momentum:
            raise UserError("keep_state: plain sgd has no state to keep, expected a momentum", loc=("keep_state",))
        if self.view == "client" and self.may_fail:
            raise UserError("may_fail: every client adds the full noise in view: client, expected 0", loc=("may_fail",))
        if self.view == "aggregate" and not 0 <= self.may_fail < self.per_round:
            raise UserError(
                f"may_fail: {self.may_fail} of {self.per_round} clients of a round, expected 0 to {self.per_round - 1}",
                loc=("may_fail",),
            )
        if self.view == "aggregate" and self.weights == "size":
            raise UserError(
                "weights: shares of the noise add up to the claimed noise for equal weights only, expected weights: "
                "equal in view: aggregate",
                loc=("weights",),
            )

    @staticmethod
    def of(given: Mapping[str, Any]) -> Settings:
        """From plain data, such as a cell's settings.

        Raises:
            UserError: an unknown name, or what the class refuses.
        """
        known = [field.name for field in fields(Settings)]
        for name in given:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{did_you_mean(name, known)}", loc=(name,))
        return Settings(**{**given, "observe": tuple(given.get("observe", ()))})

    @property
    def kind(self) -> str:
        """What a client sends: ``gradient`` or ``delta``."""
        return "gradient" if self.server == "fedsgd" else "delta"

    @property
    def summed(self) -> int:
        """How many clients' messages the server sees as one: all of a round (``aggregate``), else 1."""
        return self.per_round if self.view == "aggregate" else 1

    @property
    def server_rate(self) -> float:
        """The server's learning rate: 1 for ``fedavg``, the local one for ``fedsgd``, .001 for ``fedadam``."""
        if self.server_learning_rate is not None:
            return self.server_learning_rate
        return {"fedavg": 1.0, "fedsgd": self.learning_rate, "fedadam": 1e-3}[self.server]


def derive(seed: int, what: str, client: int = 0, round_: int = 0) -> int:
    """The seed of one random thing: the first 7 bytes of SHA-256 of ``seed:what:client:round``.

    ``what`` is ``taking part``, ``batches``, ``noise``, ``dropout`` or ``split``; clients count from 0, rounds from 1.

    >>> derive(0, "noise", 3, 1) == derive(0, "noise", 3, 1) != derive(0, "noise", 3, 2)
    True
    """
    digest = hashlib.sha256(f"{seed}:{what}:{client}:{round_}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def who_takes_part(seed: int, round_: int, *, clients: int, per_round: int) -> tuple[int, ...]:
    """The clients of a round, from 0, in increasing order: uniformly without replacement, a fresh draw a round.

    The server draws them and knows them, so no guarantee is claimed from it.

    >>> len(set(who_takes_part(0, 1, clients=20, per_round=10)))
    10
    """
    drawn = random.Random(derive(seed, "taking part", 0, round_))
    return tuple(sorted(drawn.sample(range(clients), per_round)))


def rounds_of(settings: Settings, seed: int) -> list[int]:
    """In how many rounds each client takes part.

    >>> rounds_of(Settings(clients=3, per_round=3, rounds=5), seed=1)
    [5, 5, 5]
    """
    counts = [0] * settings.clients
    for round_ in range(1, settings.rounds + 1):
        for client in who_takes_part(seed, round_, clients=settings.clients, per_round=settings.per_round):
            counts[client] += 1
    return counts
