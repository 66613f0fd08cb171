"""Whether what a folder holds may be continued: the same study on other texts is another experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpguard.errors import UserError
from dpguard.study.record import Cell
from dpguard.study.spec import Study
from dpguard.study.store import Store


def check_inputs(study: Study, folder: Path, cells: Sequence[Cell]) -> None:
    """Refuse to go on with an unchanged study file whose model or texts are not those of the records.

    A study file that was changed may name other texts: its cells are new, and the old ones are left aside.

    Raises:
        UserError: other texts or another model, with the place in the study file; or a store that cannot be read.
    """
    if not cells or not Store.begun(folder):
        return
    with Store.open(folder) as store:
        before = store.planned()
        same_file = bool(before) and store.study().yaml == study.text
    if not same_file:
        return
    for key, what in (("data", "texts"), ("model", "weights")):
        old, new = getattr(before[0], key), getattr(cells[0], key)
        if old["hash"] != new["hash"]:
            with study.locating():
                raise UserError(
                    f"{key}: these are other {what} (hash {new['hash']}) than those of the records in {str(folder)!r} "
                    f"(hash {old['hash']}), expected the same, or another --out for a run of its own",
                    loc=(key,),
                )
