"""Values of a row as what an example needs: a text, a class index, an owner, marked entities.

Every function takes the value, its column's name and ``file:line``, and raises a UserError that says all three.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dpguard.errors import UserError

_WHOLE = re.compile(r"\d{1,9}(?:\.0*)?")
"""A class index in a table; pandas writes 1.0 where a column had a missing value."""


def text(value: Any, column: str, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column} is {value!r}; expected a text", where=where)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{column} holds half a character; expected both halves of it", where=where)
    return value


def label(value: Any, column: str, where: str) -> int:
    """A class index, from 0."""
    digits = value.strip() if isinstance(value, str) else value
    if isinstance(digits, str) and _WHOLE.fullmatch(digits):
        digits = int(digits.partition(".")[0])
    elif isinstance(digits, float) and digits.is_integer():
        digits = int(digits)
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits < 10_000:
        raise UserError(f"{column} is {value!r}; expected a class index (0, 1, 2, ...)", where=where)
    return digits


def owner(value: Any, column: str, where: str) -> str:
    """Whose text it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with one missing is one of floats
    if value is None or value != value or not str(value).strip():
        raise UserError(f"{column} is {value!r}; expected who the text belongs to", where=where)
    return str(value)


def entities(value: Any, where: str, *, asked: bool) -> tuple[str, ...] | None:
    """Marked entities; a column that only happens to be called so may hold anything."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        value = listed if isinstance(listed, list) else [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        if not asked:
            return None
        raise UserError(f"entities is {value!r}; expected a list of texts", where=where)
    return tuple(value)
