"""Which budget a call runs under: a named preset, or the caller's own numbers."""

from __future__ import annotations

from collections.abc import Mapping

from dpguard.attacks.base import Budget
from dpguard.errors import UserError, did_you_mean


def choose(attack: str, presets: Mapping[str, Budget], preset: str, budget: Budget | None) -> tuple[str, Budget]:
    """The preset's name ("" means the first) and the budget, the caller's own going first.

    Raises:
        UserError: no such preset; the sentence names the nearest one.

    >>> choose("match", {"demo": Budget(80, 200)}, "", None)
    ('demo', Budget(steps=80, candidates=200, restarts=1))
    """
    name = preset or next(iter(presets))
    if name not in presets:
        raise UserError(f"attack {attack!r} has no preset {name!r}{did_you_mean(name, presets)}")
    return name, budget or presets[name]
