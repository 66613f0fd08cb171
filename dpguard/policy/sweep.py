"""Sweeps: one table with ``$name`` placeholders becomes one policy for every combination of values.

A variable that is to be looked for (`auto`) stands for the two ends of its range. One whose values are ``block[*]``
stands for the number of every such block of the model, and a row that is ``optional`` for those of its layers that
the model has; both wait for the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dpguard.errors import UserError, did_you_mean
from dpguard.policy import layers
from dpguard.policy.auto import Auto, read_auto
from dpguard.policy.layers import Slot
from dpguard.policy.optional import fitting, waits
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
        open: blocks or optional rows still wait for a model: it stands for what they will come to.
    """

    label: str
    policy: Policy
    values: dict[str, Any]
    settings: dict[str, Any]
    open: bool = False


def expand(
    name: str, entry: Mapping[str, Any], settings: Sequence[str] = (), slots: Sequence[Slot] | None = None
) -> list[Variant]:
    """Every policy of ``{rows: [...], sweep: {noise: [...]}}``, labelled ``name noise=0.3``.

    A placeholder is a whole value (``noise: $noise``) or stands inside a text (``layers: block[$b].attention.$role``).

    Args:
        name: the policy's name in the study.
        entry: ``rows`` and, optionally, ``sweep`` (variable -> list of values, or ``block[*]``; all combinations).
        settings: further keys that ``entry`` may have and that sweeps may fill.
        slots: the model's; None = not known yet, and what depends on it stays open.

    Raises:
        UserError: unknown key, a sweep variable that no row uses, a placeholder that no sweep sets, blocks that the
            model does not have, or a mistake in a row; ``loc`` is relative to ``entry``.

    >>> [variant.label for variant in expand("dp", {"rows": [{"layers": "all", "clip": "$c"}], "sweep": {"c": [1, 2]}})]
    ['dp c=1', 'dp c=2']
    >>> entry = {"rows": [{"layers": "block[$b].mlp", "clip": 1}], "epsilon": "$e", "sweep": {"b": [0], "e": [1, 3]}}
    >>> [variant.settings for variant in expand("x", entry, ["epsilon"])]
    [{'epsilon': 1}, {'epsilon': 3}]
    """
    body, sweep = _read(name, entry, settings)
    ends = {auto.variable: [auto.plain(auto.low), auto.plain(auto.high)] for auto in _autos(body, sweep)}
    blocks = {variable: _blocks(variable, text, slots) for variable, text in sweep.items() if isinstance(text, str)}
    out = []
    for values in itertools.product(*{**sweep, **ends, **blocks}.values()):
        found = _variant(name, body, dict(zip(sweep, values, strict=True)), slots)
        out.append(found._replace(open=found.open or (slots is None and bool(blocks))))
    return out


def auto_of(name: str, entry: Mapping[str, Any], settings: Sequence[str] = ()) -> Auto | None:
    """What the entry's sweep looks for, None when all its values are given.

    Raises:
        UserError: as `expand`; two variables that are looked for.
    """
    found = _autos(*_read(name, entry, settings))
    return found[0] if found else None


def variant(
    name: str,
    entry: Mapping[str, Any],
    values: Mapping[str, Any],
    settings: Sequence[str] = (),
    slots: Sequence[Slot] | None = None,
) -> Variant:
    """The policy of an entry with one value for each sweep variable, in the entry's order.

    Raises:
        UserError: as `expand`.
    """
    body, sweep = _read(name, entry, settings)
    return _variant(name, body, {key: values[key] for key in sweep}, slots)


def _variant(name: str, body: Mapping[str, Any], chosen: dict[str, Any], slots: Sequence[Slot] | None) -> Variant:
    label = " ".join([name, *(f"{key}={_short(value)}" for key, value in chosen.items())])
    filled = _fill(body, chosen)
    rows = filled.pop("rows")
    return Variant(label, Policy(fitting(rows, slots), label), chosen, filled, slots is None and waits(rows))


def _blocks(variable: str, text: str, slots: Sequence[Slot] | None) -> list[Any]:
    """The numbers of the model's blocks that a sweep asks for; what it says itself while there is no model."""
    if slots is None:
        return [layers.check_blocks(text)]
    try:
        return layers.blocks(text, slots)
    except UserError as error:
        raise UserError(f"sweep {variable!r}: {error.sentence}", loc=("sweep", variable)) from None


def _read(name: str, entry: Mapping[str, Any], settings: Sequence[str]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The parts of an entry that a sweep fills, and the sweep."""
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
    return body, sweep


def _autos(body: Mapping[str, Any], sweep: Mapping[str, Any]) -> list[Auto]:
    """The sweep's variables that are looked for: one at most."""
    found: list[Auto] = []
    for variable, values in sweep.items():
        if isinstance(values, Mapping):
            try:
                auto = read_auto(variable, values, set(_columns(body, variable)))
            except UserError as error:
                raise UserError(error.sentence, loc=("sweep", variable, *error.loc)) from None
            if found:
                raise UserError(
                    f"both {found[0].variable!r} and {variable!r} are auto; expected one a policy, and values for the "
                    "other",
                    loc=("sweep", variable),
                )
            found.append(auto)
    return found


def _columns(value: Any, variable: str, name: str = "") -> list[str]:
    """Names of the columns and settings whose value is the variable."""
    if isinstance(value, str):
        return [name] if value == f"${variable}" else []
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _columns(item, variable, str(key))]
    return [found for item in value for found in _columns(item, variable, name)] if isinstance(value, list) else []


def _check_sweep(body: Mapping[str, Any], sweep: Any) -> None:
    used = set(_placeholders(body))
    inside = set(_placeholders(body, whole=False))
    if not isinstance(sweep, Mapping):
        raise UserError(f"sweep is {sweep!r}; expected a mapping of variable to list of values", loc=("sweep",))
    for variable, values in sweep.items():
        if isinstance(values, Mapping) and variable in inside:
            raise UserError(
                f"'${variable}' stands inside a text and cannot be looked for; expected a list of values",
                loc=("sweep", variable),
            )
        if isinstance(values, str):
            _check_blocks(variable, values, inside)
        elif not isinstance(values, Mapping) and (not isinstance(values, list) or not values):
            raise UserError(f"sweep {variable!r} is {values!r}; expected a list of values", loc=("sweep", variable))
        if isinstance(values, list) and len(set(map(repr, values))) < len(values):
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


def _check_blocks(variable: str, text: str, inside: Collection[str]) -> None:
    """A text in the place of values names blocks, and stands where a block's number does."""
    try:
        layers.check_blocks(text)
    except UserError as error:
        raise UserError(f"sweep {variable!r}: {error.sentence}", loc=("sweep", variable)) from None
    if variable not in inside:
        raise UserError(
            f"'${variable}' is a block's number; expected it inside a selector, such as block[${variable}]",
            loc=("sweep", variable),
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
