"""Some policies of a study: what is run to see one point of a report again. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from dpguard.errors import UserError, did_you_mean
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell
from dpguard.study.sections import CEILING


def of_policies(cells: Sequence[Cell], labels: Sequence[str]) -> list[Cell]:
    """The cells of some policies and of the undefended control, in the order of the plan, with all that they need.

    Their ids are those of the whole study: in its folder they count as done, and elsewhere they give the same records.

    Args:
        cells: of the whole study.
        labels: policies as the report names them, such as ``dp epsilon=3``.

    Raises:
        UserError: no such policy; the sentence names the nearest.
    """
    known = {cell.policy for cell in cells}
    for label in labels:
        if label not in known:
            raise UserError(f"--only: the study has no policy {label!r}{did_you_mean(label, known)}")
    wanted = [cell for cell in cells if cell.policy in (CEILING, *labels)]
    needed = {cell.settings.get(NEEDS) for cell in wanted}
    ids = {cell.id for cell in wanted}
    return [cell for cell in cells if cell.id in ids or cell.id in needed]
