"""Sweeps: one table with ``$name`` placeholders becomes one policy for every combination of values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.table import Policy

_KEYS = ("name", "rows", "sweep")
_WHOLE = re.compile(r"^\$[\w-]+$")
_INSIDE = re.compile(r"\$([A-Za-z_]\w*)")


class Variant(NamedTuple):
    """One policy of a sweep.

    Attributes:
        label: name and values, ``dp noise=0.3``.
        policy: the table.
        values: variable -> value; empty without a sweep.
        settings: what the entry sets besides rows and sweep, filled in.
    """

    label: str
    policy: Policy
    values: dict[str, Any]
    settings: dict[str, Any]


def expand(name: str, entry: Mapping[str, Any], settings: Sequence[str] = ()) -> list[Variant]:
    """Every policy of ``{rows: [...], sweep: {noise: [...]}}``, labelled ``name noise=0.3``.

    A placeholder is a whole value (``noise: $noise``) or stands inside a text (``layers: block[$b].attention.$role``).

    Args:
        name: the policy's name in the study.
        entry: ``rows`` and, optionally, ``sweep`` (variable -> list of values; all combinations).
        settings: further keys that ``entry`` may have and that sweeps may fill.

    Raises:
        UserError: unknown key, a sweep variable that no row uses, a placeholder that no sweep sets, or a
            mistake in a row; ``loc`` is relative to ``entry``.

    >>> [variant.label for variant in expand("dp", {"rows": [{"layers": "all", "clip": "$c"}], "sweep": {"c": [1, 2]}})]
    ['dp c=1', 'dp c=2']
    >>> entry = {"rows": [{"layers": "block[$b].mlp", "clip": 1}], "epsilon": "$e", "sweep": {"b": [0], "e": [1, 3]}}
    >>> [variant.settings for variant in expand("x", entry, ["epsilon"])]
    [{'epsilon': 1}, {'epsilon': 3}]
    """
    known = (*_KEYS, *settings)
    for key in entry:
        if key not in known:
            raise UserError(f"unknown key {key!r}{did_you_mean(str(key), known)}", loc=(key,))
    if "rows" not in entry:
        raise UserError(f"policy {name!r} has no 'rows'; expected a list of rows")
    rows, sweep = entry["rows"], entry.get("sweep") or {}
    if not isinstance(rows, list):
        raise UserError(f"rows is {rows!r}; expected a list of rows", loc=("rows",))
    body = {key: entry[key] for key in ("rows", *settings) if key in entry}
    _check_sweep(body, sweep)
    out = []
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        label = " ".join([name, *(f"{key}={_short(value)}" for key, value in chosen.items())])
        filled = _fill(body, chosen)
        out.append(Variant(label, Policy(filled.pop("rows"), label), chosen, filled))
    return out


def _check_sweep(body: Mapping[str, Any], sweep: Any) -> None:
    used = set(_placeholders(body))
    inside = set(_placeholders(body, whole=False))
    if not isinstance(sweep, Mapping):
        raise UserError(f"sweep is {sweep!r}; expected a mapping of variable to list of values", loc=("sweep",))
    for variable, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep {variable!r} is {values!r}; expected a list of values", loc=("sweep", variable))
        if len(set(map(repr, values))) < len(values):
            raise UserError(
                f"sweep {variable!r} has a value twice: {values!r}; expected distinct values",
                loc=("sweep", variable),
            )
        if variable not in used:
            near = did_you_mean(str(variable), used) if used else ""
            raise UserError(
                f"sweep variable {variable!r} is used by no row; expected '${variable}' in a row{near}",
                loc=("sweep", variable),
            )
        odd = [value for value in values if isinstance(value, bool) or not isinstance(value, (str, int, float))]
        if variable in inside and odd:
            raise UserError(
                f"'${variable}' stands inside a text and is {odd[0]!r}; expected texts or numbers",
                loc=("sweep", variable),
            )
    for variable in sorted(used - set(sweep)):
        raise UserError(
            f"'${variable}' is set by no sweep{did_you_mean(variable, sweep) or '; expected a sweep: entry for it'}",
            loc=_locate(body, variable),
        )


def _names(text: str) -> list[str]:
    """The variables of one text: the whole of it (``$noise``), or every ``$word`` inside."""
    return [text[1:]] if _WHOLE.match(text) else _INSIDE.findall(text)


def _placeholders(value: Any, *, whole: bool = True) -> list[str]:
    if isinstance(value, str):
        return [] if not whole and _WHOLE.match(value) else _names(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [name for item in items for name in _placeholders(item, whole=whole)]


def _locate(value: Any, variable: str, path: tuple[str | int, ...] = ()) -> tuple[str | int, ...]:
    """Where a variable is used first."""
    if isinstance(value, str):
        return path
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return next(_locate(item, variable, (*path, key)) for key, item in items if variable in _placeholders(item))


def _fill(value: Any, chosen: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        if _WHOLE.match(value):
            return chosen[value[1:]]
        return _INSIDE.sub(lambda found: _short(chosen[found[1]]), value)
    if isinstance(value, Mapping):
        return {key: _fill(item, chosen) for key, item in value.items()}
    return [_fill(item, chosen) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
