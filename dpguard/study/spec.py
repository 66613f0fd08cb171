"""A study: what its file says, checked against itself, with every policy expanded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.federation.settings import Settings, Split
from dpguard.policy.layers import Slot
from dpguard.policy.table import Plan
from dpguard.study import grid
from dpguard.study.checks import check
from dpguard.study.policies import Named, locate, read_policies
from dpguard.study.record import Cell, is_place
from dpguard.study.schedule import Schedule
from dpguard.study.sections import (
    Caps,
    CellLimits,
    Federation,
    Leakage,
    Privacy,
    Shared,
    Source,
    StudyFile,
    Utility,
)

SHARED = ("split", "split_seed", "observe", "engine")
"""What a policy cannot set for itself of the study's federation."""


@dataclass(frozen=True)
class Study:
    """One question, ready to be planned into cells.

    Attributes:
        name: the study's identity; its records live in a folder of that name.
        question: what it answers, in words.
        model: ``demo``, a folder or a hub name, perhaps with ``+lora8`` after it; see `inputs.models.load`.
        data: where the texts come from.
        policies: in the file's order, sweeps expanded (over a model's blocks by `on`), the undefended control ``none``
            always among them.
        leakage, utility: settings of the two legs; None = the study has no such leg.
        federation: the utility leg is a federation of these settings; None = it trains in one place.
        privacy, recommend: delta and caps.
        document: the file, for places in error sentences.
        limits, cache: of its cells and of what they share; they change no result.
        left_out: policies of its file that were not asked for (``--only``), so that a report can name them.
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
    limits: CellLimits = field(default_factory=CellLimits)
    cache: Shared = field(default_factory=Shared)
    left_out: tuple[str, ...] = ()

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
            policies=read_policies(document),
            leakage=file.leakage,
            utility=file.utility or (Utility() if file.federation else None),
            privacy=file.privacy,
            recommend=file.recommend,
            document=document,
            federation=file.federation,
            limits=file.limits,
            cache=file.cache,
        )
        check(study)
        return study

    def trains(self, named: Named) -> bool:
        """Whether the utility leg trains this policy."""
        trained = self.utility.policies if self.utility else ()
        return trained is None or named.name in trained

    def utility_of(self, named: Named) -> Utility | None:
        """The training of one policy: the study's, with what the policy sets for itself; None = it is not trained.

        Raises:
            UserError: a setting that cannot be meant, with its place.
        """
        if self.utility is None or not self.trains(named):
            return None
        if not named.utility:
            return self.utility
        try:
            return Utility.model_validate({**self.utility.model_dump(exclude_unset=True), **named.utility})
        except ValidationError as error:
            raise named.document.explained(error, Utility, (*named.loc, "utility")) from None

    def federation_of(self, named: Named) -> Federation | None:
        """The federation of one policy: the study's, with what the policy sets for itself.

        Raises:
            UserError: a setting that cannot be meant, with its place.
        """
        if self.federation is None or not named.federation:
            return self.federation
        loc = (*named.loc, "federation")
        with named.document.locating(*loc):
            for name in named.federation:
                if name in SHARED:
                    told = f"federation.{name}: one for all policies, expected it in the study's federation"
                    raise UserError(told, loc=(name,))
            given = {**self.federation.model_dump(exclude_unset=True), **named.federation}
            try:
                found = Federation.model_validate(given)
                Settings.of(found.model_dump())
            except ValidationError as error:
                raise named.document.explained(error, Federation, loc) from None
            except UserError as error:
                raise UserError(f"federation.{error.sentence}", loc=error.loc) from None
        return found

    @property
    def owner_column(self) -> str | None:
        """The column that says whose a text is, when the federation is split by one."""
        return (Split.parse(self.federation.split).column or None) if self.federation else None

    @property
    def text(self) -> str:
        """The file as it was written, environment variables not replaced."""
        return self.document.text

    @property
    def model_name(self) -> str:
        """What the model is called on record: as written, or its folder's name alone where a variable says where."""
        mark = self.document.marks.get(("model",))
        return Path(self.model).name if mark and "${" in mark.raw and is_place(self.model) else self.model

    @property
    def data_name(self) -> str:
        """What the texts are called on record: the path, or the file's name alone where a variable says where it is."""
        marks = self.document.marks
        mark = marks.get(("data", "path")) or marks.get(("data",))
        return Path(self.data.path).name if mark and "${" in mark.raw else self.data.path

    @property
    def files(self) -> dict[str, str]:
        """The study's file and those of its policies as they were read: path -> text."""
        return {document.path: document.text for document in (self.document, *(n.document for n in self.policies))}

    def plain(self) -> dict[str, Any]:
        """The study as plain data with every default filled in: what its store keeps and its report prints."""
        return {
            "name": self.name,
            "question": self.question,
            "model": self.model,
            "data": self.data.model_dump(mode="json"),
            "policies": [named.label for named in self.policies],
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            "sweeps": {n.label: {"entry": n.entry, "values": dict(n.values)} for n in self.policies if n.values},
            "leakage": self.leakage and self.leakage.model_dump(mode="json"),
            "utility": self.utility and self.utility.model_dump(mode="json"),
            **({"federation": self.federation.model_dump(mode="json")} if self.federation else {}),
            "privacy": self.privacy.model_dump(mode="json"),
            "recommend": self.recommend.model_dump(mode="json"),
        }

    def locate(self, path: str) -> Path:
        """A file that the study names: beside the study file if it is there, else as seen from here."""
        return locate(self.document, path)

    def locating(self, *loc: str | int) -> AbstractContextManager[None]:
        """A context in which every UserError gets its place under ``loc`` of this file."""
        return self.document.locating(*loc)

    def on(self, slots: Sequence[Slot]) -> Study:
        """The study on a model: a policy for each of its blocks where a sweep asks for them, without rows it lacks.

        Raises:
            UserError: blocks that the model does not have; two policies that come to the same; with their place.
        """
        if not any(named.open for named in self.policies):
            return self
        found = replace(self, policies=read_policies(self.document, slots))
        check(found)
        return found

    def plans(self, slots: Sequence[Slot]) -> dict[str, Plan]:
        """Every policy resolved against a model: label -> Plan.

        Raises:
            UserError: a selector that matches nothing, ``noise`` without ``clip`` ..., with its place.
        """
        return {named.label: named.plan(slots) for named in self.policies}

    def schedule_of(self, named: Named, examples: int) -> Schedule:
        """Sampling and steps of one policy's training; one message of a known batch when nothing is trained.

        Raises:
            UserError: settings that do not fit the number of texts, with their place.
        """
        utility = self.utility_of(named)
        if utility is None:
            return Schedule(1.0, 1)
        with self.training_of(named):
            return Schedule.of(utility, examples)

    def training_of(self, named: Named) -> AbstractContextManager[None]:
        """A context in which errors about a policy's training get the place of what set it."""
        if named.utility:
            return named.document.locating(*named.loc, "utility")
        return self.document.locating("utility")

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
