"""What a report is made of: a study's plan, its records and, apart from them, its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpguard.study.record import Record, TextRow


class ReadsRecords(Protocol):
    """The part of `dpguard.study.store.Store` that a report reads."""

    def records(self) -> list[Record]:
        """Every record of the study."""
        ...

    def texts(self, cell_id: str) -> list[TextRow]:
        """True and recovered texts of one leakage cell."""
        ...

    def study(self) -> dict[str, Any]:
        """Name, question, YAML, spec and whether texts may be shown."""
        ...


@dataclass(frozen=True)
class StudyResult:
    """Everything that a report reads.

    Attributes:
        study: "name", "question", "yaml" (the exact text of the study file), "spec" (the same as data) and
            "show_text" (whether private texts may be printed).
        records: one for every finished, failed or skipped cell.
        texts: cell id -> true and recovered texts; empty where they may not be shown.
    """

    study: Mapping[str, Any]
    records: Sequence[Record]
    texts: Mapping[str, Sequence[TextRow]] = field(default_factory=dict)

    @classmethod
    def read(cls, store: ReadsRecords) -> StudyResult:
        """Read a store; texts that may not be shown are not even read."""
        result = cls(store.study(), store.records())
        if not result.shows_text:
            return result
        cells = [r.cell.id for r in result.records if r.cell.leg == "leakage" and r.status == "done"]
        return cls(result.study, result.records, {cell: store.texts(cell) for cell in cells})

    @property
    def spec(self) -> Mapping[str, Any]:
        """The study file as data."""
        spec: Mapping[str, Any] = self.study.get("spec") or {}
        return spec

    @property
    def synthetic(self) -> bool:
        """Whether the texts are the bundled ones, which describe nobody."""
        data = self.spec.get("data")
        named = [data.get("path"), data.get("name")] if isinstance(data, Mapping) else [data]
        return "demo" in named

    @property
    def shows_text(self) -> bool:
        """Whether true and recovered texts may be printed."""
        return self.synthetic or bool(self.study.get("show_text"))
