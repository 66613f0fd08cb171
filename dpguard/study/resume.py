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


def check_subset(folder: Path, cells: Sequence[Cell]) -> None:
    """Refuse to put some policies of a study in place of more that a folder holds already, and of its report.

    Raises:
        UserError: the folder's study has a policy that is none of the cells'; or its store cannot be read.
    """
    if not Store.begun(folder):
        return
    with Store.open(folder) as store:
        held = dict.fromkeys(cell.policy for cell in store.planned())
    more = [policy for policy in held if policy not in {cell.policy for cell in cells}]
    if more:
        raise UserError(
            f"--only: {str(folder)!r} holds more policies than are asked for ({more[0]!r} is one), "
            "expected --out with a folder for these alone"
        )
