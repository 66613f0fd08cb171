"""Rows that a table has only where the model has their layers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpguard.errors import UserError
from dpguard.policy.layers import Slot, select

KEY = "optional"


def waits(rows: Sequence[Any]) -> bool:
    """Whether what the table says depends on the model."""
    return any(isinstance(row, Mapping) and KEY in row for row in rows)


def fitting(rows: Sequence[Any], slots: Sequence[Slot] | None) -> list[Any]:
    """The rows of the table, an optional one with those of its layers that the model has, if it has any.

    They stand last, so that what is said about row 3 is about the third row of the file.

    Args:
        rows: as written.
        slots: the model's; None = not known yet, all rows stay.

    Raises:
        UserError: ``optional`` that is neither true nor false, or above a row that is not optional.

    >>> rows = [{"layers": "all", "clip": 1}, {"layers": ["pooler", "head"], "clip": 2, "optional": True}]
    >>> fitting(rows, [Slot("c", (2,), "head")])[1]
    {'layers': ['head'], 'clip': 2}
    """
    out, above = [], False
    for index, row in enumerate(rows):
        given = row.get(KEY, False) if isinstance(row, Mapping) else False
        if not isinstance(given, bool):
            raise UserError(f"optional is {given!r}; expected true or false", loc=("rows", index, KEY))
        if above and not given:
            raise UserError(
                f"row {index + 1} is below an optional one; expected optional rows last", loc=("rows", index)
            )
        above = given
        found = {key: value for key, value in row.items() if key != KEY} if isinstance(row, Mapping) else row
        if not given or slots is None:
            out.append(found)
        elif present := _present(row.get("layers"), slots):
            out.append({**found, "layers": present})
    return out


def _present(layers: Any, slots: Sequence[Slot]) -> Any:
    """Those of a row's selectors that name something in the model; [] when none does."""
    if isinstance(layers, list):
        return [one for one in layers if _present(one, slots)]
    try:
        select(layers, slots)
    except UserError:
        return []
    return layers
