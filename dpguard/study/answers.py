"""A study's answers without a text, as one file that can be passed on: enough to render its report and to go on from.

The file is a store (`store.ANSWERS`), which every reader takes where there are no records of one's own. No torch here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study import lock
from dpguard.study.record import Record, is_place
from dpguard.study.store import ANSWERS, FILE, Store
from dpguard.study.todo import WAITED

NEEDED = "the cell that it needs failed"
SPOKEN = ("traceback", "output")
"""Entries of a failed cell's provenance that may quote what it read."""


def write_answers(folder: str | Path, file: str | Path | None = None) -> int:
    """Write everything that a study's records say, but no true or recovered text and nothing that failed cells said.

    What is in it: the study file, every cell with its scores, predictions and labels of the test texts by their place,
    a federation's counts of texts by client, versions, revision, device, start times and costs; paths of texts and
    model as far as the study file holds them (`placed`), because a cell's id is made of them.

    Args:
        folder: of the study's records, whether finished or still running.
        file: where to; by default ``answers.sqlite`` in the folder.

    Returns:
        The number of records.

    Raises:
        UserError: no records there, a name that is the store's own, or no room to write.
    """
    file = Path(file) if file is not None else Path(folder) / ANSWERS
    if file.name.startswith((FILE, lock.LOCK)):
        raise UserError(f"--out is {str(file)!r}, which would replace the records themselves, expected another name")
    with Store.open(folder) as source:
        info, records, planned = source.study(), source.records(), source.planned()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".answers-") as made:
            with Store.open(made, create=True) as store:
                store.set_study(info.name, info.yaml, portable(info.spec), planned)
                store.put_all((_quiet(record), ()) for record in records)
            (Path(made) / FILE).replace(file)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written ({error.strerror or error}), expected room for it") from None
    return len(records)


def placed(folder: str | Path) -> list[str]:
    """Absolute paths of texts and model that the study file itself holds, so that `write_answers` passes them on.

    Raises:
        UserError: no records there.
    """
    with Store.open(folder) as source:
        cells = source.planned()
    named = {str(cell.data.get("name", "")) for cell in cells} | {str(cell.model.get("name", "")) for cell in cells}
    return sorted(name for name in named if Path(name).is_absolute())


def portable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A study as data without the places of its files on this machine.

    >>> portable({"model": "/home/a/model", "data": {"path": "/home/a/texts.jsonl", "classes": 2}})
    {'model': 'model', 'data': {'path': 'texts.jsonl', 'classes': 2}}
    """
    data, model = spec.get("data"), str(spec.get("model", ""))
    return {
        **spec,
        **({"model": Path(model).name} if is_place(model) else {}),
        **({"data": {key: Path(v).name if isinstance(v, str) else v for key, v in data.items()}}
           if isinstance(data, Mapping) else {}),
    }  # fmt: skip


def wordless(record: Record) -> Record:
    """The record without what an error in its cell said, for readers from whom texts are hidden: it may quote one.

    dpguard's own sentences about a user's mistake stay: they name places and values.
    """
    kind, _, said = record.reason.partition(": ")
    if WAITED in record.provenance:
        return replace(record, reason=NEEDED)
    if record.status != "failed" or record.provenance.get("failure") != "raised" or not (said and kind.isidentifier()):
        return record
    return replace(record, reason=f"{kind}, whose words may quote a text: dpguard show prints them")


def _quiet(record: Record) -> Record:
    """The record without what a failed cell said, its own or the one that it waited for: words may quote texts."""
    kept = {key: value for key, value in record.provenance.items() if key not in SPOKEN}
    if WAITED in kept:
        return replace(record, provenance=kept, reason=NEEDED)
    if record.status != "failed":
        return replace(record, provenance=kept)
    return replace(
        record, provenance=kept, reason=f"{kept.get('failure', 'failed')}: its words stay with its own records"
    )
