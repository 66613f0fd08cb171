"""A site's settings as people write them into a node's configuration: read strictly, because a site fails closed."""

from __future__ import annotations

from typing import Any

from dpguard.errors import UserError
from dpguard.policy.columns import number

FLAGS = {"true": True, "false": False}


def flag(name: str, value: Any) -> bool:
    """True or false, or these very words.

    Args:
        name: of the setting, for the sentence.
        value: as it was found.

    Raises:
        UserError: anything else.

    >>> flag("allow_change", "false")
    False
    """
    found = FLAGS.get(value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise UserError(f"{name} is {value!r}; expected true or false")
    return found


def epsilon(name: str, value: Any) -> float | None:
    """A budget: a number above 0, or None.

    Args:
        name: of the setting, for the sentence.
        value: as it was found.

    Raises:
        UserError: anything else.

    >>> epsilon("budget", "2.5")
    2.5
    """
    try:
        return None if value is None else number(value, above=0)
    except UserError as error:
        raise UserError(f"{name} {error.sentence}") from None
