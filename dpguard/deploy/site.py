"""One client in the field: the exported folder, the site's own table, its ledger, and what it sent last.

The order is the guarantee: a message is made, written to the outbox (with what the round makes of the layers at home),
entered in the ledger, the layers at home are moved, and only then it is returned. Whoever is killed in between sends,
after a restart, the very same message for the same round and weights, and the ledger counts it once; layers at home
move with a message in the ledger or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpguard.deploy import checks, files, gate
from dpguard.deploy.checks import Refused
from dpguard.deploy.node import epsilon, flag
from dpguard.deploy.rehearsal import MessageForm, Rehearsal, check_weights, content_of, digest
from dpguard.deploy.stricter import stricter
from dpguard.engine import noise
from dpguard.errors import UserError
from dpguard.policy.ledger import BudgetSpent, Ledger, Mechanism
from dpguard.policy.table import Plan, Policy

OUTBOX, PERSONAL, TRAINED = "outbox.safetensors", "personal.safetensors", "trained.safetensors"
HOME = "home/"
"""Before the names of layers at home in the outbox."""
RUN = "federation"


@dataclass(frozen=True)
class Reply:
    """What leaves.

    Attributes:
        tensors: shared tensor -> what is on the wire.
        metrics: the allowed numbers beside it.
        again: True when this very message was made before (same round, same weights) and is only sent again.
    """

    tensors: dict[str, Tensor]
    metrics: dict[str, float]
    again: bool = False


class Site:
    """A client with an exported folder.

    Args:
        folder: the exported folder (``policy.yaml``, ``rehearsal.json``).
        state: where this client keeps ledger, outbox and personal weights; made when missing. One client's alone.
        client: its name, for the ledger.
        table: the site's own, stricter table: a policy file, or None.
        budget: an epsilon of the site's own, at most the rehearsed one.
        allow_change: go on with what is left of the ledger under another table or budget than before; what was spent
            stays counted.
        generator: source of the noise; for tests only. None = the operating system's entropy.

    Raises:
        Refused: a table that has no stricter of the two, or one that shares nothing.
        UserError: an exported folder that is damaged, a ledger of another client or model, a laxer budget or none
            that is a number, an ``allow_change`` that is neither true nor false.
    """

    def __init__(
        self,
        folder: str | Path,
        state: str | Path,
        *,
        client: str,
        table: str | Path | None = None,
        budget: float | None = None,
        allow_change: bool = False,
        generator: noise.Source | None = None,
    ) -> None:
        self.folder, self.state = Path(folder), Path(state)
        change = flag("allow_change", allow_change)
        self.rehearsal = Rehearsal.read(folder)
        limit = _budget(self.rehearsal, epsilon("budget", budget))
        slots = self.rehearsal.model.slots
        self.plan: Plan = self.rehearsal.plan
        if table is not None:
            self.plan = stricter(self.plan, Policy.load(Path(table)).plan(slots))
        if not self.plan.shared:
            raise Refused("the site's table shares nothing of what the server's shares; expected at least one tensor")
        self.content = content_of(self.plan, self.rehearsal.message.kind)
        checks.check_content(self.plan, self.content)
        self._generator = generator or noise.SecureSource()
        message = self.rehearsal.message
        self.mechanism = Mechanism.of(self.plan, sampling_rate=message.sampling_rate, sampling=message.sampling)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep state in {self.state}: {error.strerror}; expected a folder") from None
        self.ledger = Ledger(
            client, self.rehearsal.model.kind, self.rehearsal.budget.delta, limit,
            Ledger.beside(self.state), allow_change=change,
        )  # fmt: skip
        try:
            self.ledger.accepts(self.mechanism)
            self._go_on()
        except UserError:
            self.ledger.close()
            raise

    @property
    def messages_a_round(self) -> int:
        """What one round costs in the ledger."""
        return self.rehearsal.message.local_steps if self.content == "noised" else 1

    def begin(self, weights: Mapping[str, Any], *, round_number: int, plan_hash: str | None = None) -> Reply | None:
        """Check what the server sent before any work is done on it.

        Args:
            weights: the global weights of this round.
            round_number: from 1.
            plan_hash: the table that the server says it runs, if it says so.

        Returns:
            The message of an earlier try of this very round, to be sent again; None when there is work to do.

        Raises:
            Refused: another model, other frozen weights, another table.
            BudgetSpent: the next round does not fit.
        """
        if plan_hash is not None and plan_hash != self.rehearsal.plan.hash:
            raise Refused(f"the server runs table {plan_hash}; expected {self.rehearsal.plan.hash}, the rehearsed one")
        if round_number < 1:
            raise Refused(f"round is {round_number!r}; expected a number from 1")
        base = check_weights(self.rehearsal.model, weights, self.rehearsal.plan, first=round_number == 1)
        kept = self._kept(round_number, base)
        if kept is not None:
            return kept
        if self.ledger.left(self.mechanism, RUN) < self.messages_a_round:
            raise BudgetSpent(
                f"the next round of {self.messages_a_round} messages does not fit into the budget of "
                f"{self.ledger.budget:g}; nothing was trained, nothing leaves"
            )
        return None

    def send(
        self,
        update: Mapping[str, Tensor],
        weights: Mapping[str, Any],
        *,
        round_number: int,
        form: MessageForm,
        metrics: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Let one update leave, or refuse it.

        Args:
            update: what the client computed, of this site's `content`.
            weights: the global weights of the round, as in `begin`.
            round_number: from 1; also the public seed of random pruning masks.
            form: how the update was made.
            metrics: numbers to go beside it.

        Raises:
            Refused: anything that is not what was rehearsed.
            BudgetSpent: the budget does not reach.
        """
        again = self.begin(weights, round_number=round_number)
        if again is not None:
            return again
        self._check_form(form)
        allowed = checks.check_metrics(metrics or {}, self.rehearsal.allowed)
        base = check_weights(self.rehearsal.model, weights, self.rehearsal.plan, first=round_number == 1)
        message = self.rehearsal.message
        made = gate.outgoing(
            update, self.plan, content=self.content, batch_size=message.batch_size, generator=self._generator,
            base=base, examples=form.examples, mask_seed=round_number, dtype=self.rehearsal.model.dtype,
        )  # fmt: skip
        home = self._home_after(made.home)
        number = self.ledger.next_number(RUN)
        self._keep(round_number, base, number, made.wire, home, allowed)
        self.ledger.spend(self.mechanism, (RUN, number), count=self.messages_a_round)
        self._move_in(home, number)
        return Reply(made.wire, allowed)

    def personal(self) -> dict[str, Tensor]:
        """Withheld tensor -> its weights at home, as of the last message in the ledger; empty before the first.

        Raises:
            UserError: the file is damaged.
        """
        return files.load(self.state / PERSONAL)[0]

    def keep_personal(self, weights: Mapping[str, Tensor]) -> None:
        """Hand in what local steps made of the withheld tensors: they move in with this round's message.

        Raises:
            UserError: one is missing.
        """
        missing = [name for name in self.plan.withheld if name not in weights]
        if missing:
            raise UserError(f"withheld tensor {missing[0]!r} is missing; expected all of {len(self.plan.withheld)}")
        if self.plan.withheld:
            told = {"number": str(self.ledger.next_number(RUN))}
            files.save({name: weights[name] for name in self.plan.withheld}, self.state / TRAINED, told)

    def close(self) -> None:
        """Let another process have the ledger."""
        self.ledger.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_form(self, form: MessageForm) -> None:
        meant = self.rehearsal.message
        if form == meant:
            return
        for name in ("kind", "batch_size", "sampling", "local_steps", "learning_rate", "optimizer", "momentum"):
            if getattr(form, name) != getattr(meant, name):
                raise Refused(
                    f"the update was made with {name} {getattr(form, name)!r}; expected {getattr(meant, name)!r}, "
                    "as rehearsed"
                )
        if form.sampling_rate > meant.sampling_rate * (1 + 1e-9):  # for the rounding of a division
            raise Refused(
                f"the update was made at sampling rate {form.sampling_rate:.4g}; expected at most "
                f"{meant.sampling_rate:.4g}, as rehearsed"
            )

    def _home_after(self, home: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Withheld tensors after this round: as handed in (`keep_personal`), less their own step of plain SGD.

        Args:
            home: withheld tensor -> its noised mean, where the gate makes one.
        """
        before, told = files.load(self.state / TRAINED)
        if told.get("number") != str(self.ledger.next_number(RUN)):
            before = self.personal()  # what was handed in belongs to a round that never left
        if not home:
            return before
        missing = [name for name in home if name not in before]
        if missing:
            raise UserError(f"no personal weights of {missing[0]!r} yet; expected keep_personal before the first round")
        rate = self.rehearsal.message.learning_rate
        return {name: before[name] - rate * mean for name, mean in home.items()}

    def _kept(self, round_number: int, base: Mapping[str, Tensor]) -> Reply | None:
        """The message of this very round, when it was made before; it is entered in the ledger if it was not yet."""
        path = self.state / OUTBOX
        if not path.is_file():
            return None
        told = files.about(path)
        if told.get("round") != str(round_number) or told.get("weights") != weights_digest(base):
            return None
        if told.get("plan") != self.plan.hash:
            raise Refused("the message of this round was made under another table; expected the table it began with")
        number = int(told["number"])
        self.ledger.spend(self.mechanism, (RUN, number), count=self.messages_a_round)
        message, home = _apart(files.load(path)[0])
        self._move_in(home, number)
        return Reply(message, json.loads(told["metrics"]), again=True)

    def _move_in(self, home: Mapping[str, Tensor], number: int) -> None:
        """Let the layers at home be those of a message that is in the ledger."""
        if home:
            files.save(home, self.state / PERSONAL, {"number": str(number)})
        (self.state / TRAINED).unlink(missing_ok=True)

    def _go_on(self) -> None:
        """After a restart: refuse files of messages that the ledger does not know, finish what was interrupted.

        Raises:
            UserError: the state holds a later message than the ledger, or a damaged file.
        """
        sent, at_home = (int(files.about(self.state / name).get("number", 0)) for name in (OUTBOX, PERSONAL))
        following = self.ledger.next_number(RUN)
        if sent > following or at_home >= following:
            raise UserError(
                f"{self.state} holds what message {max(sent, at_home)} made, and its ledger {following - 1} messages; "
                "expected the ledger that goes with it, from a copy (another one forgets what was spent)"
            )
        if at_home < sent < following:
            self._move_in(_apart(files.load(self.state / OUTBOX)[0])[1], sent)

    def _keep(
        self, round_number: int, base: Mapping[str, Tensor], number: int, message: Mapping[str, Tensor],
        home: Mapping[str, Tensor], metrics: Mapping[str, float],
    ) -> None:  # fmt: skip
        told = {
            "round": str(round_number),
            "weights": weights_digest(base),
            "number": str(number),
            "plan": self.plan.hash,
            "metrics": json.dumps(dict(metrics)),
        }
        files.save({**message, **{HOME + name: value for name, value in home.items()}}, self.state / OUTBOX, told)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits of a round's global weights."""
    marks = [[name, digest(value)] for name, value in weights.items()]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]


def _budget(rehearsal: Rehearsal, own: float | None) -> float | None:
    most = rehearsal.budget.epsilon
    if own is not None and own > most:
        raise UserError(f"budget is {own:g}, more than the {most:g} that was rehearsed; expected at most that")
    if own is not None:
        return own
    return rehearsal.budget.limit


def _apart(kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(message, layers at home) of an outbox."""
    home = {name.removeprefix(HOME): value for name, value in kept.items() if name.startswith(HOME)}
    return {name: value for name, value in kept.items() if not name.startswith(HOME)}, home


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """numpy arrays as tensors (writable copies); everything else as it is, for the checks to refuse."""
    out: dict[str, Any] = {}
    for name, value in arrays.items():
        known = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        out[name] = torch.from_numpy(np.array(value)) if known else value
    return out
