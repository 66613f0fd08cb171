"""What a report is made of: a study's plan, its records and, apart from them, its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpguard.errors import UserError
from dpguard.report.scores import Scores
from dpguard.study.answers import wordless
from dpguard.study.record import Cell, Record, TextRow

if TYPE_CHECKING:
    from dpguard.study.store import Store


TEXTLESS = "{0!s} holds no texts to show, expected the folder in which the study ran"
"""Said where texts are asked of answers that were passed on without them."""


@dataclass(frozen=True)
class StudyResult:
    """Everything that a report reads.

    Attributes:
        study: "name", "question", "yaml" (the exact text of the study file), "spec" (the same as data) and
            "show_text" (whether private texts may be printed).
        records: one for every finished, failed or skipped cell.
        texts: cell id -> true and recovered texts; empty where they may not be shown.
        planned: every cell of the study, run or not; without it, a cell is missing when another policy has
            its like.
    """

    study: Mapping[str, Any]
    records: Sequence[Record]
    texts: Mapping[str, Sequence[TextRow]] = field(default_factory=dict)
    planned: Sequence[Cell] = ()

    @classmethod
    def read(cls, store: Store, *, show_text: bool | None = None) -> StudyResult:
        """Read a store; texts that may not be shown are not even read.

        Args:
            store: of the study.
            show_text: show private texts, or not, instead of what was said when the study was run.

        Raises:
            UserError: texts are to be shown, and the store was passed on without any.
        """
        info = store.study()
        study = {
            "name": info.name,
            "question": info.spec.get("question", ""),
            "yaml": info.yaml,
            "spec": info.spec,
            "show_text": info.show_text if show_text is None else show_text,
        }
        result = cls(study, store.records(), planned=store.planned())
        if not result.shows_text:
            return replace(result, records=[wordless(record) for record in result.records])
        cells = [r.cell.id for r in result.records if r.cell.leg == "leakage" and r.status == "done"]
        texts = {cell: store.texts(cell) for cell in cells}
        if show_text and cells and not any(texts.values()):
            raise UserError(TEXTLESS.format(store.file))
        return cls(study, result.records, texts, result.planned)

    @property
    def spec(self) -> Mapping[str, Any]:
        """The study file as data."""
        spec: Mapping[str, Any] = self.study.get("spec") or {}
        return spec

    @cached_property
    def scores(self) -> Scores:
        """All leakage scores as arrays."""
        return Scores(self.records)

    @property
    def policies(self) -> list[str]:
        """Names of all policies in the order of the study, with or without a record."""
        named = [str(name) for name in self.spec.get("policies") or ()]
        found = [cell.policy for cell in self.planned] + [record.cell.policy for record in self.records]
        return list(dict.fromkeys(named + found))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Policies of the study file that were not asked for (``--only``)."""
        return tuple(str(name) for name in self.spec.get("left_out") or ())

    @property
    def synthetic(self) -> bool:
        """Whether the texts are the bundled ones, which describe nobody."""
        data = self.spec.get("data")
        return (data.get("path") if isinstance(data, Mapping) else data) == "demo"

    @property
    def shows_text(self) -> bool:
        """Whether true and recovered texts may be printed."""
        return self.synthetic or bool(self.study.get("show_text"))
