"""The frontier as data: each policy with what it leaks, what it is worth, what is guaranteed, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from dpguard.errors import UserError, did_you_mean
from dpguard.report.text import METRIC_NAMES, csv_cell
from dpguard.stats import Interval

CONTROL = "none"
FLOOR = "prior"
COLUMNS = [
    "policy",
    "leakage",
    "leakage_low",
    "leakage_high",
    "leakage_metric",
    "attack",
    "utility",
    "utility_low",
    "utility_high",
    "epsilon",
    "shared_fraction",
    "on_front",
]


@dataclass(frozen=True)
class Gap:
    """A cell that gave no result: ``status`` is failed, skipped or missing; ``where`` names seed and position."""

    policy: str
    leg: str
    status: str
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Answer:
    """What one attack got of a policy's messages.

    Attributes:
        value: its largest mean over positions.
        taken_over: how many of its answers are those of a cheaper attack that was certain.
        scores: how many answers there are.
    """

    value: float
    taken_over: int
    scores: int


@dataclass(frozen=True)
class Measure:
    """One leakage metric of one policy, between what a guess reaches and what the guarantee allows.

    Attributes:
        metric: its name.
        measured: largest mean over attacks and positions.
        attack, at: the attack and position that reached it.
        positions: position -> largest mean over attacks there.
        floor: of the prior attack on the same messages.
        chance: what a guess scores without any message, measured on public texts; None where it was not.
        upper: upper limit of that chance, from which the bound starts.
        bound: the most that any attack can score in the mean, given that chance; None without a guarantee.
        proven: lower limit of the measured mean at the level `ALARM`, corrected for everything that was looked at;
            None where the mean itself is not above the bound.
        answers: attack -> what it got, in the order in which they ran.
    """

    metric: str
    measured: Interval
    attack: str = ""
    at: str = ""
    floor: Interval | None = None
    chance: float | None = None
    upper: float | None = None
    bound: float | None = None
    proven: float | None = None
    positions: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """More was reached than the guarantee allows, beyond chance."""
        return self.proven is not None and self.bound is not None and self.proven > self.bound


@dataclass(frozen=True)
class Row:
    """One policy on the frontier; None where a leg is not whole.

    Attributes:
        policy: its name in the study.
        leakage: largest mean of the leakage metric over attacks and positions, in [0, 1].
        attack: the attack that reached it.
        at: the position at which it did.
        leakage_at: position -> largest mean over attacks there.
        measures: metric -> the same for every recorded metric, with chance and bound: what the sandwich shows.
        floor: the leakage metric of the prior attack on the same messages.
        utility: the study's utility metric on held-out texts.
        epsilon: of the training; infinite when there is no formal guarantee.
        sigma_eff: effective noise multiplier of one step; None without a formal guarantee.
        shared_fraction: share of the parameters that leaves the client.
        table: the policy's rows as written.
        rows, columns: length of the table, and how many columns its rows set in all: the simpler table has fewer rows,
            then fewer columns.
        attacks: the attacks that ran, the prior among them.
        positions: where in the training messages were attacked.
        seen: how many messages of one record the attacker saw, which the bounds are about.
        federation: the settings of its federation; empty without one.
        candidates: among how many disclosed texts the true one was; 0 in the open world. Exact match is then
            identification.
        gaps: what is missing, and why.
        on_front: no other policy leaks no more and is worth no less, with one of the two strict.
    """

    policy: str
    leakage: Interval | None = None
    attack: str = ""
    at: str = ""
    leakage_at: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    floor: Interval | None = None
    utility: Interval | None = None
    epsilon: float | None = None
    sigma_eff: float | None = None
    shared_fraction: float | None = None
    table: tuple[Mapping[str, Any], ...] = ()
    rows: int = 0
    columns: int = 0
    attacks: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    seen: int = 1
    federation: Mapping[str, Any] = field(default_factory=dict)
    candidates: int = 0
    gaps: tuple[Gap, ...] = ()
    on_front: bool = False

    @property
    def formal(self) -> bool:
        """Whether epsilon is known and finite."""
        return self.epsilon is not None and math.isfinite(self.epsilon)

    @property
    def trains(self) -> bool:
        """Whether its utility is measured, or was to be."""
        return self.utility is not None or any(gap.leg == "utility" for gap in self.gaps)

    @property
    def strongest(self) -> str:
        """The attack that leaked most, or that none could run."""
        return "none could run" if self.guessed else self.attack

    @property
    def saw(self) -> str:
        """What the attacker saw of one record."""
        return "one message" if self.seen == 1 else f"{self.seen} messages of the same record"

    @property
    def guessed(self) -> bool:
        """Whether messages were attacked and no attack but the guess without a message could run."""
        return bool(self.attacks) and set(self.attacks) <= {FLOOR}

    @property
    def exact(self) -> Interval | None:
        """How often a text came back whole."""
        found = self.measures.get("exact_match")
        return found.measured if found else None

    @property
    def broken(self) -> tuple[Measure, ...]:
        """The measures of which more was reached than the guarantee allows, beyond chance: a bug somewhere."""
        return tuple(measure for measure in self.measures.values() if measure.broken)


@dataclass(frozen=True)
class Frontier:
    """All policies of a study, in the study's order.

    Attributes:
        rows: one for every policy.
        leakage_metric: what ``leakage`` measures.
        utility_metric: what ``utility`` measures.
        floor: the leakage metric of the prior attack, which sees no message; None when it did not run.
        majority: accuracy or F1 of always answering one class, the commonest (in a federation each client's own) or
            the one that F1 is about; None where utility is neither.
        by_client: that class is each client's own.
        parts: the parts of the model, in its order.
    """

    rows: tuple[Row, ...]
    leakage_metric: str
    utility_metric: str
    floor: Interval | None = None
    majority: float | None = None
    by_client: bool = False
    parts: tuple[str, ...] = ()

    @property
    def commonest(self) -> str:
        """What `majority` always answers."""
        if self.utility_metric == "f1":
            return "one class"
        return "each client's own commonest class" if self.by_client else "the commonest class"

    @property
    def idle(self) -> float | None:
        """What an answer without a model is worth; None where it is not known."""
        return 0.0 if self.utility_metric == "mcc" else self.majority

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every recorded leakage metric, the one that the report leads with first."""
        found = sorted({metric for row in self.rows for metric in row.measures} - {self.leakage_metric})
        order = [name for name in METRIC_NAMES if name in found] + [name for name in found if name not in METRIC_NAMES]
        return (self.leakage_metric, *order)

    def by(self, metric: str) -> Frontier:
        """The same policies led by another recorded leakage metric.

        Raises:
            UserError: a metric that no record has.
        """
        if metric == self.leakage_metric:
            return self
        if metric not in self.metrics:
            raise UserError(
                f"no record has the leakage metric {metric!r}{did_you_mean(metric, self.metrics)}",
                loc=("leakage", "metric"),
            )
        rows = [led_by(row, metric) for row in self.rows]
        control = next((row.floor for row in rows if row.policy == CONTROL and row.floor), None)
        floor = control or next((row.floor for row in rows if row.floor), None)
        return replace(self, rows=tuple(mark_front(rows)), leakage_metric=metric, floor=floor)

    def row(self, policy: str) -> Row | None:
        """The row of a policy, or None."""
        return next((row for row in self.rows if row.policy == policy), None)

    @property
    def ceiling(self) -> Row | None:
        """The undefended control."""
        return self.row(CONTROL)

    @property
    def trains(self) -> bool:
        """Whether the study measures utility, or was to."""
        return any(row.trains for row in self.rows)

    @property
    def trades(self) -> bool:
        """Whether two policies can be weighed by what they leak and are worth; a single one by itself, too."""
        return sum(row.trains for row in self.rows) >= min(2, len(self.rows))

    @property
    def positions(self) -> tuple[str, ...]:
        """Every place in the training from which messages were attacked."""
        return tuple(dict.fromkeys(at for row in self.rows for at in row.positions))

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Every cell without a result."""
        return tuple(gap for row in self.rows for gap in row.gaps)

    def to_frame(self) -> pd.DataFrame:
        """The columns of frontier.csv, typed; NaN where nothing was measured, and infinite epsilons."""
        return pd.DataFrame([_columns(row, self.leakage_metric) for row in self.rows], columns=COLUMNS)

    def to_csv(self) -> str:
        """The text of frontier.csv: infinity is ``inf``, a missing number is empty, formulas are disarmed."""
        frame = self.to_frame()
        for name in ("policy", "leakage_metric", "attack"):
            frame[name] = [csv_cell(text) for text in frame[name]]
        return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def _columns(row: Row, metric: str) -> dict[str, Any]:
    leakage, utility = row.leakage, row.utility
    return {
        "policy": row.policy,
        "leakage": leakage.value if leakage else math.nan,
        "leakage_low": leakage.low if leakage else math.nan,
        "leakage_high": leakage.high if leakage else math.nan,
        "leakage_metric": metric,
        "attack": row.attack,
        "utility": utility.value if utility else math.nan,
        "utility_low": utility.low if utility else math.nan,
        "utility_high": utility.high if utility else math.nan,
        "epsilon": math.nan if row.epsilon is None else row.epsilon,
        "shared_fraction": math.nan if row.shared_fraction is None else row.shared_fraction,
        "on_front": row.on_front,
    }


def led_by(row: Row, metric: str) -> Row:
    """The row with another recorded metric as its leakage; without leakage where that was not measured."""
    found = row.measures.get(metric)
    if found is None:
        return replace(row, leakage=None, attack="", at="", floor=None, leakage_at={})
    return replace(
        row, leakage=found.measured, attack=found.attack, at=found.at, floor=found.floor, leakage_at=found.positions
    )


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``on_front`` set: the Pareto front of low leakage and high utility, by the point estimates.

    One policy of several makes no front: it beats nothing that was measured.
    """
    known = [(row.leakage.value, row.utility.value) for row in rows if row.leakage and row.utility]
    alone = len(known) < min(2, len(rows))

    def on_front(row: Row) -> bool:
        if alone or row.leakage is None or row.utility is None:
            return False
        x, y = row.leakage.value, row.utility.value
        return not any(a <= x and b >= y and (a < x or b > y) for a, b in known)

    return [replace(row, on_front=on_front(row)) for row in rows]
