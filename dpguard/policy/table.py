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
from dpguard.policy.layers import Slot, select

if TYPE_CHECKING:
    import pandas as pd


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
        return _Resolver(self, slots).plan()


class _Resolver:
    """Column-by-column cascade over tensors, remembering which row had the last word."""

    def __init__(self, policy: Policy, slots: Sequence[Slot]) -> None:
        self.policy = policy
        self.slots = list(slots)
        self.tensor = {s.name: s.tied_to or s.name for s in self.slots}
        self.first = [s for s in self.slots if not s.tied_to]
        # (tensor, column) -> (row index, value, names of the tensor that the row used)
        self.last: dict[tuple[str, str], tuple[int, Any, frozenset[str]]] = {}

    def plan(self) -> Plan:
        for index, row in enumerate(self.policy._read):
            self._apply(index, row)
        rules = {slot.name: self._rule(slot) for slot in self.first}
        self._check_dead_rows(rules)
        self._check_units(rules)
        return Plan(rules, tuple(dict(row) for row in self.policy.rows), self.policy.name)

    def _apply(self, index: int, row: Row) -> None:
        named: dict[str, set[str]] = {}
        for position, selector in enumerate(row.layers):
            try:
                found = select(selector, self.slots)
            except UserError as error:
                loc = ("rows", index, "layers") + ((position,) if row.listed else ())
                raise UserError(error.sentence, loc=loc) from None
            for slot in found:
                named.setdefault(self.tensor[slot.name], set()).add(slot.name)
        for tensor, names in named.items():
            for column, value in row.columns.items():
                self._set(tensor, column, index, value, frozenset(names))

    def _set(self, tensor: str, column: str, index: int, value: Any, names: frozenset[str]) -> None:
        before = self.last.get((tensor, column))
        if before is not None and not (before[2] & names) and before[1] != value:
            raise UserError(
                f"{sorted(names)[0]!r} and {sorted(before[2])[0]!r} are one tied tensor, but rows "
                f"{before[0] + 1} and {index + 1} set its {column} to {before[1]!r} and {value!r}; "
                "expected one value",
                loc=("rows", index, column),
            )
        self.last[(tensor, column)] = (index, value, names)

    def _value(self, tensor: str, column: str, default: Any) -> Any:
        found = self.last.get((tensor, column))
        return default if found is None else found[1]

    def _rule(self, slot: Slot) -> Rule:
        def get(column: str, default: Any) -> Any:
            return self._value(slot.name, column, default)

        clip, noise, noise_std = get("clip", None), get("noise", 0.0), get("noise_std", 0.0)
        trained = bool(slot.trainable and get("train", True))
        if noise and clip is None and trained:
            raise self._error(
                slot,
                "noise",
                f"noise {noise:g} on {slot.name!r} without a clip; expected a clip (its unit) or noise_std",
            )
        if noise and noise_std:
            raise self._error(
                slot,
                "noise_std",
                f"{slot.name!r} has both noise {noise:g} and noise_std {noise_std:g}; expected one of them",
            )
        quantile = clip if isinstance(clip, Quantile) else None
        return Rule(
            slot=slot,
            train=trained,
            share=get("share", True),
            clip=clip if quantile is None else quantile.start,
            group="" if clip is None else self._group(slot),
            # like `per`, mode and unit say how a clip works: they go with the row that set it
            mode="clip" if clip is None else self._clip_row(slot).columns.get("mode", "clip"),
            unit="example" if clip is None else self._clip_row(slot).columns.get("unit", "example"),
            noise=noise,
            noise_std=noise_std,
            keep=get("keep", 1.0),
            prune=get("prune", "magnitude"),
            bits=get("bits", None),
            release=get("release", ()),
            quantile=quantile,
        )

    def _clip_row(self, slot: Slot) -> Row:
        return self.policy._read[self.last[(slot.name, "clip")][0]]

    def _group(self, slot: Slot) -> str:
        """Group id: the row that set the clip, split by that row's ``per``."""
        index, per = self.last[(slot.name, "clip")][0], self._clip_row(slot).per
        part = {"row": "", "block": slot.part, "role": slot.role, "tensor": slot.name}[per]
        return f"row {index + 1}" + (f" {part}" if part else "")

    def _error(self, slot: Slot, column: str, sentence: str) -> UserError:
        index = self.last[(slot.name, column)][0]
        return UserError(sentence, loc=("rows", index, column))

    def _check_units(self, rules: Mapping[str, Rule]) -> None:
        found = {rule.unit: rule for rule in rules.values() if rule.train and rule.group}
        if len(found) > 1:
            update, example = found["update"], found["example"]
            index = max(self.last[(rule.slot.name, "clip")][0] for rule in found.values())
            raise UserError(
                f"{update.slot.name!r} is clipped with unit 'update' and {example.slot.name!r} with unit 'example'; "
                "expected one unit for every trained layer, in every row that sets a clip",
                loc=("rows", index, "unit" if "unit" in self.policy._read[index].columns else "clip"),
            )

    def _check_dead_rows(self, rules: Mapping[str, Rule]) -> None:
        alive = set()
        # mode and unit live and die with the clip of their row
        last = {key: value for key, value in self.last.items() if key[1] not in ("mode", "unit")}
        for (tensor, column), (index, _value, _names) in last.items():
            rule = rules[tensor]
            needs = COLUMNS[column].acts_on
            if needs == "any" or (needs == "trained" and rule.train) or (needs == "sent" and rule.sent):
                alive.add(index)
        for index, row in enumerate(self.policy._read):
            if index in alive:
                continue
            counts = any(value[0] == index for value in last.values())
            why = "what it selects is frozen or withheld" if counts else "later rows override all of it"
            raise UserError(
                f"row {index + 1} ({', '.join(row.layers)}) changes nothing: {why}; expected every row to count",
                loc=("rows", index),
            )
