"""A policy is a table: rows that select layers and set columns; resolved against a model it is a `Plan`.

Nothing here touches a tensor. The engine runs the plan, the accountant reads it, the attacker knows it,
the report prints it, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.columns import COLUMNS, Quantile, Row, number, read_row
from dpguard.policy.layers import Slot

if TYPE_CHECKING:
    import pandas as pd

    from dpguard.policy.guarantee import Accountant, Sampling


@dataclass(frozen=True)
class Rule:
    """What the policy says about one tensor.

    Attributes:
        slot: the tensor (its first name when tied).
        train: the client updates it.
        share: it leaves the client.
        clip: bound on the L2 norm over ``group`` of one example's gradient, or of the client's whole update
            (``unit``); None = not clipped; of an adaptive clip, the bound now in force.
        group: id of the clip group, "" without a clip.
        mode: ``clip`` or ``normalise``.
        unit: ``example`` or ``update``.
        noise: noise multiplier (std of the summed gradient's noise / clip).
        noise_std: absolute std per entry on the wire, uncalibrated.
        keep: fraction of entries sent.
        prune: ``magnitude`` or ``random``.
        bits: bits per entry, None = full.
        release: further post-noise operations, (name, setting).
        quantile: how an adaptive clip moves between steps, None for a fixed one.
    """

    slot: Slot
    train: bool = True
    share: bool = True
    clip: float | None = None
    group: str = ""
    mode: str = "clip"
    unit: str = "example"
    noise: float = 0.0
    noise_std: float = 0.0
    keep: float = 1.0
    prune: str = "magnitude"
    bits: int | None = None
    release: tuple[tuple[str, Any], ...] = ()
    quantile: Quantile | None = None

    @property
    def sent(self) -> bool:
        """True when the tensor is on the wire: trained here and shared."""
        return self.train and self.share

    @property
    def whole(self) -> bool:
        """True when every entry arrives as it was computed and noised: not pruned, rounded or released otherwise."""
        return self.keep == 1 and self.bits is None and not self.release

    def std(self, batch_size: float) -> float:
        """Standard deviation of the noise on one entry of the SUM over the batch (before the division)."""
        if self.clip is None or not self.noise:
            return self.noise_std * batch_size
        # an update is clipped after the division by the batch size, so its noise is in wire units
        return self.noise * self.clip * (batch_size if self.unit == "update" else 1)

    def describe(self) -> str:
        """What happens to the tensor after the noise, in words ("" when nothing does)."""
        words = [] if self.keep == 1 else [f"keep {self.keep:g} by {self.prune}"]
        if self.bits is not None:
            words.append(f"{self.bits} bit" + ("s" if self.bits > 1 else ""))
        return ", ".join(words + [f"{name} {value}" for name, value in self.release])


@dataclass(frozen=True)
class Group:
    """A clip group: the trained tensors whose joint per-example norm is bounded by one number.

    Attributes:
        id: its name, e.g. ``row 1`` or ``row 1 block[2]``.
        clip: the bound C now in force.
        mode: ``clip`` or ``normalise``.
        unit: ``example`` or ``update``.
        rules: its tensors.
        quantile: how an adaptive bound moves, None for a fixed one.
    """

    id: str
    clip: float
    mode: str
    unit: str
    rules: tuple[Rule, ...]
    quantile: Quantile | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names."""
        return tuple(rule.slot.name for rule in self.rules)


@dataclass(frozen=True)
class Plan(Mapping[str, Rule]):
    """One `Rule` for every tensor of a model: parameter name -> Rule, in the model's order.

    A tied tensor appears once, under its first name.
    """

    rules: dict[str, Rule]
    rows: tuple[dict[str, Any], ...]
    name: str = ""

    def __getitem__(self, name: str) -> Rule:
        return self.rules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    @property
    def groups(self) -> dict[str, Group]:
        """Clip groups over the trained tensors, in the model's order."""
        members: dict[str, list[Rule]] = {}
        for rule in self.rules.values():
            if rule.group and rule.train:
                members.setdefault(rule.group, []).append(rule)
        return {
            name: Group(name, rules[0].clip or 0.0, rules[0].mode, rules[0].unit, tuple(rules), rules[0].quantile)
            for name, rules in members.items()
        }

    @property
    def unit(self) -> str:
        """``update`` when the client's whole update is what is clipped, else ``example``."""
        return "update" if any(group.unit == "update" for group in self.groups.values()) else "example"

    def with_clips(self, clips: Mapping[str, float]) -> Plan:
        """The same groups with other bounds; the noise follows, because its std is noise * clip.

        Args:
            clips: clip group -> bound; groups not named keep theirs.

        Raises:
            UserError: an unknown group, or a bound that is no number above 0.
        """
        for group, clip in clips.items():
            if group not in self.groups:
                raise UserError(f"no clip group is called {group!r}{did_you_mean(group, self.groups)}")
            try:
                number(clip, above=0)
            except UserError as error:
                raise UserError(f"clip of group {group!r} {error.sentence}") from None
        rules = {
            name: replace(rule, clip=float(clips[rule.group])) if rule.group in clips else rule
            for name, rule in self.rules.items()
        }
        return replace(self, rules=rules)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that the client updates."""
        return tuple(name for name, rule in self.rules.items() if rule.train)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the tensors on the wire."""
        return tuple(name for name, rule in self.rules.items() if rule.sent)

    @property
    def withheld(self) -> tuple[str, ...]:
        """Names of the tensors that are trained but stay with the client."""
        return tuple(name for name, rule in self.rules.items() if rule.train and not rule.share)

    @property
    def shared_fraction(self) -> float:
        """Share of the model's parameters that leaves (ignores keep and bits)."""
        total = sum(rule.slot.size for rule in self.rules.values())
        return sum(rule.slot.size for rule in self.rules.values() if rule.sent) / total

    @property
    def hash(self) -> str:
        """16 hex digits that change when any rule, name or shape changes."""
        content = [
            [name, list(rule.slot.shape), *(getattr(rule, column) for column in COLUMNS if column != "per"), rule.group]
            # records are found by this hash: rules of fixed clips keep the one they always had
            + ([] if rule.quantile is None else [repr(rule.quantile)])
            for name, rule in self.rules.items()
        ]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]

    def to_frame(self) -> pd.DataFrame:
        """One row a tensor, every column of the table, its role, part, shape and share of the model."""
        import pandas as pd

        total = sum(rule.slot.size for rule in self.rules.values())
        rows = []
        for name, rule in self.rules.items():
            head = {
                "parameter": name,
                "part": rule.slot.part,
                "role": rule.slot.role,
                "shape": rule.slot.shape,
            }
            rows.append(
                head
                | {"fraction": rule.slot.size / total, "group": rule.group}
                | {column: getattr(rule, column) for column in COLUMNS if column != "per"}
                | {"quantile": None if rule.quantile is None else rule.quantile.quantile}
            )
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Policy:
    """An ordered table of rows; later rows override earlier ones, column by column.

    Args:
        rows: mappings with the key ``layers`` and any of the columns (see `columns.COLUMNS`).
        name: how the policy is called.

    Raises:
        UserError: an unknown column, a value outside its range, ``noise`` without ``clip`` ... with
            ``loc`` = ("rows", index, column).

    >>> Policy([{"layers": "all", "clip": 1.0, "noise": 0.8}], name="dp-sgd").rows[0]["noise"]
    0.8
    """

    rows: Sequence[Mapping[str, Any]]
    name: str = ""
    _read: tuple[Row, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.rows, (str, Mapping)) or not isinstance(self.rows, Sequence):
            raise UserError(f"rows is {self.rows!r}; expected a list of rows", loc=("rows",))
        read = tuple(read_row(row, index) for index, row in enumerate(self.rows))
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "rows", tuple(dict(row) for row in self.rows))

    @staticmethod
    def load(source: str | Path) -> Policy:
        """A policy file (``{name: ..., rows: [...]}``), a ready-made name, or a selector (share just that).

        Raises:
            UserError: neither a file, a ready-made policy nor a selector; or a mistake in the file, with
                file, line and column.
        """
        from dpguard.policy.ready import load

        return load(source)

    def plan(self, slots: Sequence[Slot]) -> Plan:
        """Resolve against a model's slots (``dpguard.slots(model)``).

        Raises:
            UserError: a selector that matches nothing, ``noise`` where nothing is clipped, contradicting
                rows on a tied tensor, or a row that changes nothing; ``loc`` names row and column.
        """
        from dpguard.policy.cascade import Cascade

        return Cascade(self, slots).plan()

    def calibrate(
        self,
        slots: Sequence[Slot],
        *,
        epsilon: float,
        delta: float,
        sampling_rate: float,
        steps: int,
        accountant: Accountant | None = None,
        sampling: Sampling = "poisson",
        examples: int | None = None,
    ) -> Policy:
        """A new policy with one common factor on all noise, so that ``epsilon`` is kept and nearly used up.

        A table with clips but no noise gets noise 1 in every row that sets a clip before. The price of
        adaptive clips is not scaled.

        Args:
            slots: the model's (``dpguard.slots(model)``).
            epsilon: the target; the result's is at most this and at most 1 % below.
            delta: as are all that follow, what `guarantee.guarantee` is asked.
            sampling_rate: public batch size / number of examples.
            steps: number of messages.
            accountant: the engine's when None.
            sampling: ``poisson`` or ``shuffle``.
            examples: the public number of examples.

        Raises:
            UserError: no noise reaches the target (something leaves clean, the counts of adaptive clips
                alone cost more), nothing leaves, or a target that is no number above 0.
        """
        from dpguard.policy.calibrate import calibrate

        return calibrate(
            self, slots,
            epsilon=epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps,
            accountant=accountant, sampling=sampling, examples=examples,
        )  # fmt: skip
