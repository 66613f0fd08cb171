"""What a run has to do: the cells without an answer that counts. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell, Record
from dpguard.study.store import FINISHED, Store

AGAIN = "killed"
"""The kind of failure that says nothing about a cell: its process was ended from outside. It runs again."""
WAITED = "waited_for"
"""In the provenance of a cell that was skipped because of another: that one's id."""


@dataclass(frozen=True)
class Todo:
    """The work of a run.

    Attributes:
        cells: to run, in the study's order.
        left: failed records that stay as they are.
    """

    cells: tuple[Cell, ...]
    left: tuple[Record, ...]

    @staticmethod
    def of(cells: Sequence[Cell], store: Store, *, retry_failed: bool = False, known: Collection[str] = ()) -> Todo:
        """Cells without a record, failed ones that are to run again, and those skipped because of one of them.

        Args:
            cells: what is to be answered.
            store: with the records so far.
            retry_failed: run all failed cells again.
            known: ids of cells whose answers would be taken over first (`reuse.take`).
        """
        held = store.statuses()
        statuses = {**held, **{cell_id: "done" for cell_id in known if held.get(cell_id) not in FINISHED}}
        failed = (record for record in store.failed() if statuses[record.cell.id] == "failed")
        left = {record.cell.id: record for record in failed if not retry_failed and not again(record)}
        todo: dict[str, Cell] = {}
        for cell in cells:
            status, needed = statuses.get(cell.id), cell.settings.get(NEEDS)
            waits = status == "skipped" and (needed in todo or _free(store, cell.id, statuses.get(needed or "")))
            if waits or (status not in FINISHED and cell.id not in left):
                todo[cell.id] = cell
        return Todo(tuple(todo.values()), tuple(left[cell.id] for cell in cells if cell.id in left))

    @staticmethod
    def ahead(cells: Sequence[Cell], folder: Path, *, retry_failed: bool = False, known: Collection[str] = ()) -> Todo:
        """As `of`, for a folder that need not exist; nothing is written."""
        if not Store.begun(folder):
            return Todo(tuple(cell for cell in cells if cell.id not in known), ())
        with Store.open(folder) as store:
            return Todo.of(cells, store, retry_failed=retry_failed, known=known)


def _free(store: Store, cell_id: str, needed: str | None) -> bool:
    """Whether a cell was skipped for want of another one that has been done since."""
    record = store.record(cell_id) if needed == "done" else None
    return record is not None and WAITED in record.provenance


def again(record: Record) -> bool:
    """Whether a failed record is missing work rather than an answer."""
    return record.provenance.get("failure") == AGAIN
