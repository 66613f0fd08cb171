"""What one client has spent on one model, over rounds, runs and restarts, and how much is left.

Every message is entered before it leaves; all of them are composed jointly, whatever mechanisms they came from.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from dpguard.errors import UserError
from dpguard.policy import gaussian, ledger_file
from dpguard.policy.calibrate import default_accountant
from dpguard.policy.guarantee import Accountant, Sampling, Unit, check_arguments, exposure, sigma_eff
from dpguard.policy.reasons import why_infinite
from dpguard.policy.table import Plan

FILE_NAME = "dpguard-ledger.json"
MOST = 10**6
"""`Ledger.left` looks this far ahead."""


class BudgetSpent(UserError):  # noqa: N818 - it is what happened, not a failure
    """The next message would exceed the budget; it was not entered and must not leave."""


@dataclass(frozen=True)
class Mechanism:
    """What a ledger must know about a message, and nothing of its content.

    Attributes:
        plan: hash of the plan as resolved (adaptive clips at their start values).
        sigma_eff: effective noise multiplier of a message.
        sampling_rate: probability that an example takes part in it; 1 when a client is the unit.
        unit: ``example`` or ``client``.
        sampling: ``poisson`` or ``shuffle``.
        reasons: why epsilon is infinite, from the second message on at the latest.
    """

    plan: str
    sigma_eff: float
    sampling_rate: float
    unit: Unit = "example"
    sampling: Sampling = "poisson"
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.reasons and not self.sigma_eff > 0:
            raise UserError(f"sigma_eff is {self.sigma_eff!r} without a reason; expected a number above 0")
        check_arguments(self.sampling_rate, 1, 0.5, self.sampling, None)

    @staticmethod
    def of(
        plan: Plan, *, sampling_rate: float, sampling: Sampling = "poisson", carries: Collection[str] = ()
    ) -> Mechanism:
        """A policy's mechanism, as one of several messages: what is carried over between them counts at once.

        Raises:
            UserError: as `guarantee.guarantee`.
        """
        client, reasons = plan.unit == "update", why_infinite(plan, 2, carries)
        return Mechanism(
            plan.hash,
            0.0 if reasons else sigma_eff(plan, 2),
            1.0 if client else sampling_rate,
            "client" if client else "example",
            sampling,
            reasons,
        )


@dataclass(frozen=True)
class _Entry:
    mechanism: Mechanism
    runs: dict[str, int] = field(default_factory=dict)  # run -> messages; they add up to its highest number

    def more(self, run: str, count: int) -> _Entry:
        return replace(self, runs={**self.runs, run: self.runs.get(run, 0) + count})

    def exposures(self) -> tuple[float, float, int]:
        """(sigma, sampling rate, steps) to compose. Every run shuffles anew, so each rounds up on its own."""
        each = [exposure(self.mechanism.sampling, self.mechanism.sampling_rate, n) for n in self.runs.values() if n]
        rate = each[0][0] if each else 1.0
        return self.mechanism.sigma_eff, rate, sum(steps for _rate, steps in each)


class Ledger:
    """The privacy ledger of one client and one model.

    Args:
        client: the client's name.
        model: fingerprint of the model that the messages are about.
        delta: of (epsilon, delta), in (0, 1).
        budget: the epsilon that is never exceeded; None = what the file says, and no limit without one.
        path: the file, read when it exists and written before every message; None = in memory only.
        allow_change: accept another policy than the file's latest, and a laxer budget or delta; what was
            spent before stays counted.
        accountant: the engine's when None.

    Raises:
        UserError: an argument out of range, or a file that is another client's or model's, damaged, of an
            unknown version, in use, an older copy, or gone though there was one.

    >>> ledger = Ledger("clinic 3", "f00d", delta=1e-5, budget=8.0)
    >>> step = Mechanism("abc", sigma_eff=2.0, sampling_rate=1.0)
    >>> ledger.spend(step, key=("monday", 1)), ledger.spend(step, key=("monday", 1))
    (True, False)
    >>> round(ledger.epsilon(), 2), ledger.left(step)
    (1.99, 10)
    """

    def __init__(
        self,
        client: str,
        model: str,
        delta: float,
        budget: float | None = None,
        path: str | Path | None = None,
        *,
        allow_change: bool = False,
        accountant: Accountant | None = None,
    ) -> None:
        if not 0 < delta < 1:
            raise UserError(f"delta is {delta!r}; expected a number above 0 and below 1")
        if budget is not None and not budget > 0:
            raise UserError(f"budget is {budget!r}; expected an epsilon above 0, or None")
        self.client, self.model, self.delta, self.budget = client, model, delta, budget
        # the file itself: beside a link another process would not see the lock, and replacing the link forgets
        self.path = None if path is None else Path(path).resolve()
        self.allow_change = allow_change
        self._accountant = accountant
        self._entries: tuple[_Entry, ...] = ()
        self._plan = ""  # hash of the plan of the latest message
        self._ahead: tuple[Mechanism, str, int] | None = None  # how many more fit, counted down
        self._guard = threading.RLock()
        self._lock = None if self.path is None else ledger_file.Lock(self.path)
        try:
            self._open()
        except UserError:
            self.close()
            raise

    def _open(self) -> None:
        if self.path is None or self._lock is None:
            return
        entered = self._lock.entered
        if self.path.exists():
            self._load(self.path, ledger_file.read(self.path))
        elif entered:
            raise UserError(
                f"ledger {self.path} is gone, though {entered} messages were entered; expected the file from a copy (a "
                "new one would forget what was spent; what is begun anew needs a folder of its own)"
            )
        if self.messages < entered:
            raise UserError(
                f"ledger {self.path} holds {self.messages} messages, and {entered} were entered; expected the latest "
                "file (an older one forgets what was spent)"
            )
        if self.messages:
            self._lock.enter(self.messages)

    @staticmethod
    def beside(folder: str | Path) -> Path:
        """Where the ledger of a saved model lives."""
        return Path(folder) / FILE_NAME

    @property
    def messages(self) -> int:
        """How many messages are entered."""
        return sum(sum(entry.runs.values()) for entry in self._entries)

    def next_number(self, run: str) -> int:
        """The number of the next new message of a run: 1, 2, 3 ... also after a restart."""
        return 1 + sum(entry.runs.get(run, 0) for entry in self._entries)

    def epsilon(self, delta: float | None = None) -> float:
        """Joint epsilon of everything entered, at ``delta`` (default: the ledger's)."""
        with self._guard:
            return self._compose(self._entries, self.delta if delta is None else delta)

    def spend(self, mechanism: Mechanism, key: tuple[str, int], *, count: int = 1) -> bool:
        """Enter one message, or ``count`` at once; on disk when this returns; call it before they leave.

        Args:
            mechanism: what makes the message.
            key: (run, number); the numbers of a run are 1, 2, 3 ... without gaps. A key names one message,
                the same tensors: whoever makes a message anew, with new noise, takes a new number.
            count: how many messages, numbered from the key's on (several noised local steps behind one
                update): all are entered or none.

        Returns:
            True; False when these very messages were entered before (sent again, or resumed after a crash).

        Raises:
            BudgetSpent: they would exceed the budget; nothing is entered.
            UserError: another policy than the latest's without ``allow_change``, another unit, a gap in the
                numbers, a closed ledger, or a disk that refuses; nothing is entered.
        """
        run, number = key
        with self._guard:
            self._check(mechanism, run, number, count)
            new = number + count - self.next_number(run)
            if new <= 0:
                self._check_entered(mechanism, run)
                return False
            if self.left(mechanism, run) < new:
                raise self._spent(mechanism, run, number + count - 1, new)
            entries = _with(self._entries, mechanism, run, new)
            if self.path is not None:
                ledger_file.write(self.path, self._content(entries, mechanism.plan))
            self._entries, self._plan = entries, mechanism.plan
            if self._lock is not None:
                self._lock.enter(self.messages)
            if self._ahead is not None and self._ahead[:2] == (mechanism, run):
                self._ahead = (mechanism, run, self._ahead[2] - new)
            else:
                self._ahead = None
            return True

    def spend_next(self, mechanism: Mechanism, run: str, *, count: int = 1) -> int:
        """Enter the next ``count`` messages of a run, whichever threads enter some beside; see `spend`.

        Returns:
            The number of the first of them.
        """
        with self._guard:
            number = self.next_number(run)
            self.spend(mechanism, (run, number), count=count)
            return number

    def left(self, mechanism: Mechanism, run: str = "") -> float:
        """How many more messages of a mechanism fit into the budget: infinity without a budget or a cost.

        Looks `MOST` messages ahead. Searched once, then counted down.

        Args:
            mechanism: what will make them.
            run: which run sends them; matters for shuffled batches only, which every run shuffles anew.
        """
        with self._guard:
            if self.budget is None or (mechanism.sigma_eff == math.inf and not mechanism.reasons):
                return math.inf
            if self._ahead is None or self._ahead[:2] != (mechanism, run) or self._ahead[2] < 1:  # MOST may be over
                budget = self.budget
                count = largest(
                    lambda n: self._compose(_with(self._entries, mechanism, run, n), self.delta), budget, MOST
                )
                self._ahead = (mechanism, run, count)
            return self._ahead[2]

    def close(self) -> None:
        """Let another process have the file; a second call does nothing."""
        if self._lock is not None:
            self._lock.close()

    def __repr__(self) -> str:
        limit = "no budget" if self.budget is None else f"budget {self.budget:g}"
        return f"Ledger(client {self.client!r}, {self.messages} messages, delta {self.delta:g}, {limit})"

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, mechanism: Mechanism, run: str, number: int, count: int) -> None:
        if not run or not isinstance(run, str) or isinstance(number, bool) or number != int(number) or number < 1:
            raise UserError(f"key is {(run, number)!r}; expected a run's name and a message number from 1")
        if isinstance(count, bool) or count != int(count) or count < 1:
            raise UserError(f"count is {count!r}; expected a number of messages from 1")
        if number > self.next_number(run):
            raise UserError(
                f"message {number} of run {run!r} follows message {self.next_number(run) - 1}; expected "
                f"{self.next_number(run)}, because a gap would let a message leave uncounted"
            )
        self.accepts(mechanism)

    def _check_entered(self, mechanism: Mechanism, run: str) -> None:
        """A message of before is paid for under the mechanism that made it, not under any other."""
        if not any(entry.mechanism == mechanism and run in entry.runs for entry in self._entries):
            raise UserError(
                f"run {run!r} was entered under another policy, noise or sampling rate; expected the next number for "
                "what is made anew"
            )

    def accepts(self, mechanism: Mechanism) -> None:
        """Refuse a mechanism that `spend` would refuse whatever the message: worth asking before any work.

        Raises:
            UserError: another policy than the latest's without ``allow_change``, another unit, or a closed ledger.
        """
        if self._lock is not None and not self._lock.held:
            raise UserError(f"ledger {self.path} is closed, or another process opened it; expected an open one")
        units = {entry.mechanism.unit for entry in self._entries}
        if units - {mechanism.unit}:
            raise UserError(
                f"the ledger of client {self.client!r} counts per {units.pop()}, this policy per {mechanism.unit}; "
                "expected one unit (use a ledger for each)"
            )
        if self._plan and mechanism.plan != self._plan and not self.allow_change:
            raise UserError(
                f"the policy has changed (plan {mechanism.plan}, the ledger's latest is {self._plan}); expected the "
                "same one, or allow_change=True to go on with what is left"
            )

    def _spent(self, mechanism: Mechanism, run: str, number: int, new: int) -> BudgetSpent:
        would = self._compose(_with(self._entries, mechanism, run, new), self.delta)
        why = f" ({'; '.join(mechanism.reasons)})" if mechanism.reasons else ""
        return BudgetSpent(
            f"message {number} of run {run!r} would bring client {self.client!r} to epsilon {would:.4g}{why} at delta "
            f"{self.delta:g}, above its budget of {self.budget:g}; {self.messages} messages are spent"
        )

    def _compose(self, entries: tuple[_Entry, ...], delta: float) -> float:
        counted = [entry for entry in entries if any(entry.runs.values())]
        if any(entry.mechanism.reasons for entry in counted):
            return math.inf
        history = [part for part in (entry.exposures() for entry in counted) if part[0] < math.inf and part[2]]
        mu = math.sqrt(sum(steps / sigma**2 for sigma, _rate, steps in history))
        # Without sampling every message holds the example: never better for privacy, so also an upper bound.
        exact = gaussian.epsilon_of(mu, delta)
        if all(rate == 1 for _sigma, rate, _steps in history):
            return exact
        self._accountant = self._accountant or default_accountant()
        return min(exact, self._accountant.compose(history=history, delta=delta))

    def _content(self, entries: tuple[_Entry, ...], plan: str) -> dict[str, Any]:
        rows = [{**asdict(e.mechanism), "reasons": list(e.mechanism.reasons), "runs": e.runs} for e in entries]
        for row in rows:
            row["sigma_eff"] = "inf" if row["sigma_eff"] == math.inf else row["sigma_eff"]
        return {"client": self.client, "model": self.model, "delta": self.delta, "budget": self.budget,
                "plan": plan, "entries": rows}  # fmt: skip

    def _load(self, path: Path, found: dict[str, Any]) -> None:
        for name, mine in (("client", self.client), ("model", self.model)):
            if found[name] != mine:
                raise UserError(f"ledger {path} is of another {name}, {found[name]!r}; expected {mine!r}")
        for name, given in (("budget", self.budget), ("delta", self.delta)):
            if found[name] is not None and given is not None and given > found[name] and not self.allow_change:
                raise UserError(
                    f"{name} is {given:g}, laxer than the {found[name]:g} of ledger {path}; expected at most that, or "
                    "allow_change=True"
                )
        self.budget = found["budget"] if self.budget is None else self.budget
        self._plan = found["plan"]
        self._entries = tuple(_entry(row) for row in found["entries"])


def _entry(row: dict[str, Any]) -> _Entry:
    facts = {key: value for key, value in row.items() if key != "runs"}
    facts |= {"reasons": tuple(row["reasons"]), "sigma_eff": float(row["sigma_eff"])}
    return _Entry(Mechanism(**facts), cast(dict[str, int], row["runs"]))


def _with(entries: tuple[_Entry, ...], mechanism: Mechanism, run: str, count: int) -> tuple[_Entry, ...]:
    if all(entry.mechanism != mechanism for entry in entries):
        entries = (*entries, _Entry(mechanism))
    return tuple(e.more(run, count) if e.mechanism == mechanism else e for e in entries)


def largest(cost: Callable[[int], float], limit: float, most: int) -> int:
    """The largest n up to ``most`` with cost(n) <= limit, for a cost that grows with n; 0 when 1 is too much.

    False position on the logarithms, aimed a little to both sides in turn, so that both ends close in: some
    ten queries for a hundred thousand messages.

    >>> largest(lambda n: n**0.5, 100.0, 10**6)
    10000
    """
    low, high = (0, 0.0), (1, cost(1))
    while high[1] <= limit:
        if high[0] >= most:
            return most
        low, high = high, (min(high[0] * 8, most), cost(min(high[0] * 8, most)))
    turn = 0
    while high[0] - low[0] > 1:
        middle, turn = (low[0] + high[0]) // 2, turn + 1
        if turn % 4 and 0 < low[1] < high[1] < math.inf:
            slope = math.log(high[0] / low[0]) / math.log(high[1] / low[1])
            aim = low[0] * math.exp(slope * math.log(limit / low[1]))
            aside = 0.02 * (high[0] - low[0])
            middle = round(aim + (aside if turn % 2 else -aside))
        middle = min(max(middle, low[0] + 1), high[0] - 1)
        found = (middle, cost(middle))
        low, high = (found, high) if found[1] <= limit else (low, found)
    return low[0]
