"""Sweeps: one table with ``$name`` placeholders becomes one policy for every combination of values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.table import Policy

_KEYS = ("name", "rows", "sweep")


class Variant(NamedTuple):
    """One policy of a sweep.

    Attributes:
        label: name and values, ``dp noise=0.3``.
        policy: the table.
        values: variable -> value; empty without a sweep.
    """

    label: str
    policy: Policy
    values: dict[str, Any]


def expand(name: str, entry: Mapping[str, Any]) -> list[Variant]:
    """Every policy of ``{rows: [...], sweep: {noise: [...]}}``, labelled ``name noise=0.3``.

    Args:
        name: the policy's name in the study.
        entry: ``rows`` and, optionally, ``sweep`` (variable -> list of values; all combinations).

    Raises:
        UserError: unknown key, a sweep variable that no row uses, a placeholder that no sweep sets, or a
            mistake in a row; ``loc`` is relative to ``entry``.

    >>> [variant.label for variant in expand("dp", {"rows": [{"layers": "all", "clip": "$c"}], "sweep": {"c": [1, 2]}})]
    ['dp c=1', 'dp c=2']
    """
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}", loc=(key,))
    if "rows" not in entry:
        raise UserError(f"policy {name!r} has no 'rows'; expected a list of rows")
    rows, sweep = entry["rows"], entry.get("sweep") or {}
    if not isinstance(rows, list):
        raise UserError(f"rows is {rows!r}; expected a list of rows", loc=("rows",))
    _check_sweep(rows, sweep)
    if not sweep:
        return [Variant(name, Policy(rows, name), {})]
    out = []
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        label = f"{name} " + " ".join(f"{key}={_short(value)}" for key, value in chosen.items())
        out.append(Variant(label, Policy(_fill(rows, chosen), label), chosen))
    return out


def _check_sweep(rows: Sequence[Any], sweep: Any) -> None:
    used = set(_placeholders(rows))
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
    for variable in sorted(used - set(sweep)):
        loc = next(iter(_locate(rows, f"${variable}")))
        raise UserError(
            f"'${variable}' is set by no sweep{did_you_mean(variable, sweep) or '; expected a sweep: entry for it'}",
            loc=("rows", *loc),
        )


def _placeholders(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value[1:]] if value.startswith("$") else []
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in _placeholders(item)]
    return [name for item in value for name in _placeholders(item)] if isinstance(value, list) else []


def _locate(value: Any, wanted: str, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if value == wanted:
        return [path]
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _locate(item, wanted, (*path, key))]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _locate(item, wanted, (*path, i))]
    return []


def _fill(value: Any, chosen: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value.startswith("$"):
        return chosen[value[1:]]
    if isinstance(value, Mapping):
        return {key: _fill(item, chosen) for key, item in value.items()}
    return [_fill(item, chosen) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
