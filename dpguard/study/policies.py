"""The policies of a study file: entries expanded into named tables, each with what it sets for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpguard.documents import Document, Loc
from dpguard.errors import UserError, did_you_mean
from dpguard.policy.auto import Auto
from dpguard.policy.layers import Slot
from dpguard.policy.ready import ready
from dpguard.policy.sweep import Variant, auto_of, expand, variant
from dpguard.policy.table import Plan, Policy
from dpguard.study.record import canonical
from dpguard.study.sections import CEILING, OWN_TRAINING

_SETTINGS = ("federation", "utility", "epsilon")


@dataclass(frozen=True, eq=False)
class Search:
    """A sweep variable whose value is looked for, beside one choice of the other variables.

    Attributes:
        auto: what is looked for, and where.
        name: the entry's name under ``policies``.
        others: the other sweep variables' values.
        entry: the entry as read.
        document, loc: where it stands.
        slots: the model's, None while they are not known.
    """

    auto: Auto
    name: str
    others: Mapping[str, Any]
    entry: Mapping[str, Any]
    document: Document
    loc: Loc
    slots: Sequence[Slot] | None = None

    @property
    def label(self) -> str:
        """The name of what is common to all its policies."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.others.items())])

    def named(self, value: float) -> Named:
        """The policy at one value.

        Raises:
            UserError: a value that the table cannot take, with its place.
        """
        values = {**self.others, self.auto.variable: self.auto.plain(value)}
        with self.document.locating(*self.loc):
            found = variant(self.name, self.entry, values, _SETTINGS, self.slots)
            return _named(found, self.name, self.document, self.loc, self)


@dataclass(frozen=True)
class Named:
    """One policy of a study.

    Attributes:
        label: its name in every table, with its sweep values (``dp-sgd noise=0.6``).
        policy: the table.
        document: the file that holds it: the study's, or the policy's own.
        loc: where in that file.
        federation: what it sets of the study's federation for itself, such as ``{view: aggregate}``.
        utility: what it sets of the study's training for itself, such as ``{batch_size: 1}``.
        entry: its name under ``policies``, without sweep values.
        values: sweep variable -> value.
        epsilon: what its noise still has to be scaled to (`Study.calibrated`); None when the rows are as they will run.
        search: what its value was or will be found by, None when it was given.
        note: something to tell the user about how its value was found.
        open: it stands for what the model's blocks and layers will make of it (`Study.on`).
    """

    label: str
    policy: Policy
    document: Document
    loc: Loc
    federation: Mapping[str, Any] = field(default_factory=dict)
    utility: Mapping[str, Any] = field(default_factory=dict)
    entry: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float | None = None
    search: Search | None = None
    note: str = ""
    open: bool = False

    @property
    def name(self) -> str:
        """What it is called under ``policies``, without sweep values."""
        return self.entry or self.label

    @property
    def identity(self) -> str:
        """What makes it another policy than the next."""
        return canonical([self.table, dict(self.federation), dict(self.utility), self.epsilon])

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [dict(row) for row in self.policy.rows]

    def plan(self, slots: Sequence[Slot]) -> Plan:
        """The policy resolved against a model.

        Raises:
            UserError: as `Policy.plan`, with file, line and column.
        """
        with self.document.locating(*self.loc):
            return self.policy.plan(slots)


def read_policies(document: Document, slots: Sequence[Slot] | None = None) -> tuple[Named, ...]:
    """The entries of ``policies``, expanded, with the undefended control first when it was left out.

    Args:
        document: the study's.
        slots: the model's; None = not known yet, and policies that depend on them stay open.

    Raises:
        UserError: what cannot be meant, or the same policy twice; with its place.
    """
    found: list[Named] = []
    if CEILING not in document.data["policies"]:
        found.append(Named(CEILING, ready(CEILING), document, ("policies",)))
    for name, entry in document.data["policies"].items():
        with document.locating("policies", name):
            found.extend(_expanded(name, entry, document, slots))
    labels: dict[str, Named] = {}
    tables: dict[str, Named] = {}
    for named in found:
        with named.document.locating(*named.loc):
            if named.label in labels:
                raise UserError(f"two policies are called {named.label!r}, expected a name of its own for each")
            twin = tables.get(named.identity)
            if twin is not None and not (twin.open or named.open):
                raise UserError(
                    f"policies {twin.label!r} and {named.label!r} are the same table, expected each one once"
                )
        labels[named.label] = tables[named.identity] = named
    return tuple(found)


def _expanded(name: str, entry: Any, document: Document, slots: Sequence[Slot] | None) -> list[Named]:
    loc: Loc = ("policies", name)
    if name == CEILING and entry not in (None, CEILING):
        raise UserError(f"{CEILING!r} is the undefended control of every study, expected another name for this")
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        document, loc = Document.read(locate(document, entry)), ()
        entry = document.data
    if entry is None or isinstance(entry, str):
        return [Named(name, ready(name if entry is None else entry), document, loc)]
    if not isinstance(entry, dict):
        raise UserError(
            f"policy {name!r} is {entry!r}, expected {{rows: [...]}}, a ready-made policy's name or a policy file"
        )
    with document.locating(*loc):
        auto = auto_of(name, entry, _SETTINGS)
        if auto is None:
            return [_named(found, name, document, loc, None) for found in expand(name, entry, _SETTINGS, slots)]
        return _searched(auto, name, entry, document, loc, slots)


def _searched(
    auto: Auto, name: str, entry: Mapping[str, Any], document: Document, loc: Loc, slots: Sequence[Slot] | None
) -> list[Named]:
    """The ends of every search's range; one stand-in for what is computed before anything is planned."""
    if auto.computed and "epsilon" in entry:
        raise UserError("epsilon is set beside a sweep that looks for one; expected one of them", loc=("epsilon",))
    found: dict[str, tuple[Search, list[Named]]] = {}
    for one in expand(name, entry, _SETTINGS, slots):
        others = {key: value for key, value in one.values.items() if key != auto.variable}
        fresh = Search(auto, name, others, entry, document, loc, slots)
        search, own = found.setdefault(canonical(others), (fresh, []))
        own.append(_named(one, name, document, loc, search))
    if not auto.computed:
        return [named for _, own in found.values() for named in own]
    return [
        replace(own[-1], label=f"{search.label} {auto.variable}=auto", values=search.others, epsilon=auto.aim)
        for search, own in found.values()
    ]


def _named(found: Variant, name: str, document: Document, loc: Loc, search: Search | None) -> Named:
    return Named(
        found.label, found.policy, document, loc, entry=name, values=found.values, search=search, open=found.open,
        **_own(found.settings),
    )  # fmt: skip


def _own(more: dict[str, Any]) -> dict[str, Any]:
    """What a policy sets for itself, as far as it can be checked without the study's own sections."""
    for key, example in (("federation", "{view: aggregate}"), ("utility", "{batch_size: 1024}")):
        if not isinstance(more.get(key, {}), dict):
            raise UserError(f"{key} is {more[key]!r}, expected a mapping such as {example}", loc=(key,))
        for name, value in more.get(key, {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}.{name} is {value}, expected a finite number", loc=(key, name))
    for key in more.get("utility", {}):
        if key not in OWN_TRAINING:
            raise UserError(
                f"utility.{key}: a policy cannot set this for itself{did_you_mean(key, OWN_TRAINING)}",
                loc=("utility", key),
            )
    if "epsilon" in more:
        number = more["epsilon"]
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UserError(f"epsilon is {number!r}, expected a number above 0", loc=("epsilon",))
    return more


def locate(document: Document, path: str) -> Path:
    """A file that a document names: beside it if it is there, else as seen from here."""
    beside = Path(document.path).parent / path
    return beside if beside.exists() else Path(path)
