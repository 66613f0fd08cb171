"""How rows become rules: a cascade, column by column, as in a style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpguard.errors import UserError
from dpguard.policy.columns import COLUMNS, Quantile, Row
from dpguard.policy.layers import Slot, select
from dpguard.policy.table import Plan, Policy, Rule


class Cascade:
    """Column-by-column cascade over tensors, remembering which row had the last word; see `table.Policy.plan`."""

    def __init__(self, policy: Policy, slots: Sequence[Slot]) -> None:
        self.policy = policy
        self.slots = list(slots)
        self.tensor = {s.name: s.tied_to or s.name for s in self.slots}
        self.first = [s for s in self.slots if not s.tied_to]
        # (tensor, column) -> (row index, value, names of the tensor that the row used)
        self.last: dict[tuple[str, str], tuple[int, Any, frozenset[str]]] = {}

    def plan(self) -> Plan:
        """One rule a tensor, checked."""
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
            if acts(column, rules[tensor]):
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


def acts(column: str, rule: Rule) -> bool:
    """Whether a column can change anything about a tensor: nothing but ``train`` and ``share`` does on a frozen one."""
    needs = COLUMNS[column].acts_on
    return needs == "any" or (needs == "trained" and rule.train) or (needs == "sent" and rule.sent)
