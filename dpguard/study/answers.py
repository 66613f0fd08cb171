"""A study's answers without a text, as one file that can be passed on: enough to render its report and to go on from.

The file is a store (`store.ANSWERS`), which every reader takes where there are no records of one's own. No torch here.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from dpguard.errors import UserError
from dpguard.study.record import Record
from dpguard.study.store import ANSWERS, FILE, Store

SPOKEN = ("traceback", "output")
"""Entries of a failed cell's provenance that may quote what it read."""


def write_answers(folder: str | Path, file: str | Path | None = None) -> int:
    """Write everything that a study's records say, but no true or recovered text and no output of failed cells.

    What is in it: the study file, every cell with its scores, predictions and labels of the test texts by their place,
    versions and costs.

    Args:
        folder: of the study's records, whether finished or still running.
        file: where to; by default ``answers.sqlite`` in the folder.

    Returns:
        The number of records.

    Raises:
        UserError: no records there, or no room to write.
    """
    file = Path(file) if file is not None else Path(folder) / ANSWERS
    if file.name == FILE:
        raise UserError(f"--out is {str(file)!r}, which would replace the records themselves, expected another name")
    with Store.open(folder) as source:
        info, records, planned = source.study(), source.records(), source.planned()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".answers-") as made:
            with Store.open(made, create=True) as store:
                store.set_study(info.name, info.yaml, info.spec, planned)
                store.put_all((_quiet(record), ()) for record in records)
            (Path(made) / FILE).replace(file)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written ({error.strerror or error}), expected room for it") from None
    return len(records)


def _quiet(record: Record) -> Record:
    return replace(record, provenance={key: v for key, v in record.provenance.items() if key not in SPOKEN})
