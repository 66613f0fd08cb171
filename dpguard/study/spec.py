"""A study: what its file says, checked against itself, with every policy expanded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpguard.documents import Document, Loc
from dpguard.errors import UserError
from dpguard.federation.settings import Settings, Split
from dpguard.policy.layers import Slot
from dpguard.policy.ready import ready
from dpguard.policy.sweep import expand
from dpguard.policy.table import Plan, Policy
from dpguard.study import grid
from dpguard.study.record import Cell, canonical
from dpguard.study.sections import CEILING, Caps, Federation, Leakage, Privacy, Source, StudyFile, ThreatModel, Utility

SHARED = ("split", "split_seed", "observe", "engine")
"""What a policy cannot set for itself of the study's federation."""


@dataclass(frozen=True)
class Named:
    """One policy of a study.

    Attributes:
        label: its name in every table, with its sweep values (``dp-sgd noise=0.6``).
        policy: the table.
        document: the file that holds it: the study's, or the policy's own.
        loc: where in that file.
        federation: what it sets of the study's federation for itself, such as ``{view: aggregate}``.
        entry: its name under ``policies``, without sweep values.
        values: sweep variable -> value.
    """

    label: str
    policy: Policy
    document: Document
    loc: Loc
    federation: Mapping[str, Any] = field(default_factory=dict)
    entry: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Study:
    """One question, ready to be planned into cells.

    Attributes:
        name: the study's identity; its records live in a folder of that name.
        question: what it answers, in words.
        model: ``demo``, a folder or a hub name.
        data: where the texts come from.
        policies: in the file's order, sweeps expanded, the undefended control ``none`` always among them.
        leakage, utility: settings of the two legs; None = the study has no such leg.
        federation: the utility leg is a federation of these settings; None = it trains in one place.
        privacy, recommend: delta and caps.
        document: the file, for places in error sentences.
    """

    name: str
    question: str
    model: str
    data: Source
    policies: tuple[Named, ...]
    leakage: Leakage | None
    utility: Utility | None
    privacy: Privacy
    recommend: Caps
    document: Document
    federation: Federation | None = None

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a study file.

        Raises:
            UserError: anything in the file that cannot be meant, with file, line and column.
        """
        return cls.read(Document.read(path))

    @classmethod
    def read(cls, document: Document) -> Study:
        """As `load`, from a document.

        Raises:
            UserError: as `load`.
        """
        file = document.check(StudyFile)
        study = cls(
            name=file.name,
            question=file.question,
            model=file.model,
            data=file.data,
            policies=_policies(document),
            leakage=file.leakage,
            utility=file.utility or (Utility() if file.federation else None),
            privacy=file.privacy,
            recommend=file.recommend,
            document=document,
            federation=file.federation,
        )
        with document.locating():
            study._check_legs()
            study._check_federation()
        return study

    def _check_legs(self) -> None:
        if self.leakage is None and self.utility is None:
            raise UserError("the study measures nothing, expected a 'leakage' or a 'utility' section")
        if self.leakage and "end" in self.leakage.at and self.utility is None:
            raise UserError(
                "leakage.at: 'end' attacks the weights that the utility leg ends with, expected a 'utility' section",
                loc=("leakage", "at"),
            )
        for cap, leg, given in (
            ("max_leakage", "leakage", self.leakage),
            ("min_utility", "utility", self.utility),
        ):
            if getattr(self.recommend, cap) is not None and given is None:
                raise UserError(
                    f"recommend.{cap}: nothing measures it, expected a {leg!r} section", loc=("recommend", cap)
                )

    def _check_federation(self) -> None:
        """What a federation takes the place of is not set beside it, and what needs one has one."""
        rounds = self.leakage is not None and "rounds" in self.leakage.at
        if self.federation is None:
            own = next((named for named in self.policies if named.federation), None)
            if own is not None:
                raise UserError(
                    f"policy {own.label!r} sets a federation of its own, expected a 'federation' section of the study",
                    loc=(*own.loc, "federation"),
                )
            if rounds:
                raise UserError(
                    "leakage.at: 'rounds' attacks the rounds of a federation, expected a 'federation' section",
                    loc=("leakage", "at"),
                )
            return
        try:
            Settings.of(self.federation.model_dump())
        except UserError as error:
            raise UserError(f"federation.{error.sentence}", loc=("federation", *error.loc)) from None
        same: dict[str, Named] = {}
        for named in self.policies:
            found = self.federation_of(named)
            twin = same.setdefault(canonical([named.table, found and found.model_dump(mode="json")]), named)
            if twin is not named:
                raise UserError(
                    f"policies {twin.label!r} and {named.label!r} are the same table in the same federation, expected "
                    "each one once",
                    loc=named.loc,
                )
        if rounds != bool(self.federation.observe):
            missing, where = ("observe: [1, 2]", "leakage") if rounds else ("leakage.at: rounds", "federation")
            key = "at" if rounds else "observe"
            raise UserError(
                f"{where}.{key}: the same record at several rounds needs both, expected {missing}", loc=(where, key)
            )
        if self.utility is not None:
            for name in ("epochs", "batch_size", "learning_rate", "optimizer"):
                if name in self.utility.model_fields_set:
                    other = "rounds" if name == "epochs" else name
                    raise UserError(
                        f"utility.{name}: a federation has its own, expected federation.{other}", loc=("utility", name)
                    )
        if self.leakage is not None:
            for name in ("local_steps", "learning_rate", "clients"):
                if getattr(self.leakage.threat, name) != getattr(ThreatModel(), name):
                    raise UserError(
                        f"leakage.threat.{name}: the message is the federation's, expected none beside a federation",
                        loc=("leakage", "threat", name),
                    )

    def federation_of(self, named: Named) -> Federation | None:
        """The federation of one policy: the study's, with what the policy sets for itself.

        Raises:
            UserError: a setting that cannot be meant, with its place.
        """
        if self.federation is None or not named.federation:
            return self.federation
        loc = (*named.loc, "federation")
        for name in named.federation:
            if name in SHARED:
                raise UserError(
                    f"federation.{name}: one for all policies, expected it in the study's federation", loc=(*loc, name)
                )
        try:
            found = Federation.model_validate({**self.federation.model_dump(exclude_unset=True), **named.federation})
            Settings.of(found.model_dump())
        except ValidationError as error:
            raise self.document.explained(error, Federation, loc) from None
        except UserError as error:
            raise UserError(f"federation.{error.sentence}", loc=(*loc, *error.loc)) from None
        return found

    @property
    def owner_column(self) -> str | None:
        """The column that says whose a text is, when the federation is split by one."""
        return (Split.parse(self.federation.split).column or None) if self.federation else None

    @property
    def text(self) -> str:
        """The file as it was written, environment variables not replaced."""
        return self.document.text

    def plain(self) -> dict[str, Any]:
        """The study as plain data with every default filled in: what its store keeps and its report prints."""
        return {
            "name": self.name,
            "question": self.question,
            "model": self.model,
            "data": self.data.model_dump(mode="json"),
            "policies": [named.label for named in self.policies],
            "sweeps": {n.label: {"entry": n.entry, "values": dict(n.values)} for n in self.policies if n.values},
            "leakage": self.leakage and self.leakage.model_dump(mode="json"),
            "utility": self.utility and self.utility.model_dump(mode="json"),
            **({"federation": self.federation.model_dump(mode="json")} if self.federation else {}),
            "privacy": self.privacy.model_dump(mode="json"),
            "recommend": self.recommend.model_dump(mode="json"),
        }

    def locate(self, path: str) -> Path:
        """A file that the study names: beside the study file if it is there, else as seen from here."""
        return _locate(self.document, path)

    def locating(self, *loc: str | int) -> AbstractContextManager[None]:
        """A context in which every UserError gets its place under ``loc`` of this file."""
        return self.document.locating(*loc)

    def plans(self, slots: Sequence[Slot]) -> dict[str, Plan]:
        """Every policy resolved against a model: label -> Plan.

        Raises:
            UserError: a selector that matches nothing, ``noise`` without ``clip`` ..., with its place.
        """
        return {named.label: named.plan(slots) for named in self.policies}

    def cells(
        self, model: Mapping[str, Any], data: Mapping[str, Any], panel: Mapping[str, Any] | None = None
    ) -> list[Cell]:
        """Everything to run, in the order of running; see `grid.cells`.

        Args:
            model: what identifies the model, ``{"name", "hash"}``.
            data: what identifies the texts, ``{"name", "hash", "train", "test"}`` with counts.
            panel: what identifies the attacker, ``{"name", "hash", "attacks"}``; when None, what the study
                says of it.

        Raises:
            UserError: settings that do not fit the number of texts, with file, line and column.
        """
        with self.document.locating():
            return grid.cells(self, dict(model), dict(data), dict(panel) if panel else None)


def _locate(document: Document, path: str) -> Path:
    beside = Path(document.path).parent / path
    return beside if beside.exists() else Path(path)


def _policies(document: Document) -> tuple[Named, ...]:
    """The entries of ``policies``, expanded, with the undefended control first when it was left out."""
    found: list[Named] = []
    if CEILING not in document.data["policies"]:
        found.append(Named(CEILING, ready(CEILING), document, ("policies",)))
    for name, entry in document.data["policies"].items():
        with document.locating("policies", name):
            found.extend(_expanded(name, entry, document))
    labels: dict[str, Named] = {}
    tables: dict[str, Named] = {}
    for named in found:
        with named.document.locating(*named.loc):
            if named.label in labels:
                raise UserError(f"two policies are called {named.label!r}, expected a name of its own for each")
            twin = tables.get(canonical([named.table, dict(named.federation)]))
            if twin is not None:
                raise UserError(
                    f"policies {twin.label!r} and {named.label!r} are the same table, expected each one once"
                )
        labels[named.label] = tables[canonical([named.table, dict(named.federation)])] = named
    return tuple(found)


def _expanded(name: str, entry: Any, document: Document) -> list[Named]:
    loc: Loc = ("policies", name)
    if name == CEILING and entry not in (None, CEILING):
        raise UserError(f"{CEILING!r} is the undefended control of every study, expected another name for this")
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        document, loc = Document.read(_locate(document, entry)), ()
        entry = document.data
    if entry is None or isinstance(entry, str):
        return [Named(name, ready(name if entry is None else entry), document, loc)]
    if not isinstance(entry, dict):
        raise UserError(
            f"policy {name!r} is {entry!r}, expected {{rows: [...]}}, a ready-made policy's name or a policy file"
        )
    own = entry.get("federation", {})
    with document.locating(*loc):
        if not isinstance(own, dict):
            raise UserError(
                f"federation is {own!r}, expected a mapping such as {{view: aggregate}}", loc=("federation",)
            )
        table = {key: value for key, value in entry.items() if key != "federation"}
        return [
            Named(found.label, found.policy, document, loc, own, name, found.values) for found in expand(name, table)
        ]
