"""The columns of a policy table: names, ranges, defaults, and what a row must have to be meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dpguard.errors import UserError, did_you_mean
from dpguard.policy import layers as selectors

PER = ("row", "block", "role", "tensor")
MODES = ("clip", "normalise")
UNITS = ("example", "update")
PRUNE = ("magnitude", "random")
MOST = 1e12
"""Of clips and noise: far above anything meant, and its square and products are numbers still."""


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: its key in a row.
        read: turns what YAML gave into the value, or raises UserError.
        acts_on: which tensors it can change: ``any``, ``trained`` or ``sent`` ones.
        meaning: one line for the documentation.
    """

    name: str
    read: Callable[[Any], Any]
    acts_on: str
    meaning: str


@dataclass(frozen=True)
class Quantile:
    """An adaptive clip: follow a quantile of the norms by noised counts (Andrew et al., arXiv 1905.03871, Sec. 2).

    Attributes:
        quantile: fraction of the examples that should stay below the bound, in (0, 1).
        start: the bound of the first step, public.
        rate: learning rate of the geometric update C <- C exp(-rate (counted - quantile)).
        count_noise: std of the noise on the count of examples below the bound, in examples; it has its price.
    """

    quantile: float
    start: float = 1.0
    rate: float = 0.2
    count_noise: float = 10.0


@dataclass(frozen=True)
class Row:
    """One row as read: who, which columns, how its clip groups form."""

    layers: tuple[str, ...]
    columns: dict[str, Any]
    per: str = "row"
    listed: bool = True


def number(
    value: Any,
    *,
    above: float | None = None,
    least: float = 0.0,
    most: float = math.inf,
    below: float | None = None,
) -> float:
    """A finite number inside its range; text that YAML failed to read as a number (``1e-1``) is accepted.

    Raises:
        UserError: no number, or out of range.

    >>> number("1e-1")
    0.1
    """
    low = f"above {above:g}" if above is not None else f"at least {least:g}"
    high = f" and below {below:g}" if below is not None else f" and at most {most:g}" if most < math.inf else ""
    wanted = f"a number {low}{high}"
    if isinstance(value, bool):
        raise UserError(f"is {value}; expected {wanted}")  # a document adds which word YAML read so
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"is {repr(value)[:40]}; expected {wanted}") from None
    outside = (above is not None and found <= above) or (below is not None and found >= below)
    if not math.isfinite(found) or found < least or found > most or outside:
        raise UserError(f"is {value!r}; expected {wanted}")
    return found


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"is {value!r}; expected true or false")
    return value


def _word(known: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            raise UserError(f"is {value!r}{did_you_mean(str(value), known)}")
        return str(value)

    return read


def _noise(value: Any) -> float:
    return number(value, most=MOST)


def _clip(value: Any) -> float | Quantile:
    return _quantile(value) if isinstance(value, Mapping) else number(value, above=0, most=MOST)


def _quantile(value: Mapping[Any, Any]) -> Quantile:
    known = [setting.name for setting in fields(Quantile)]
    for key in value:
        if key not in known:
            raise UserError(f"has the unknown setting {key!r}{did_you_mean(str(key), known)}", loc=(str(key),))
    if "quantile" not in value:
        raise UserError(f"is {dict(value)!r}; expected a number, or a mapping with 'quantile'")
    found = {}
    for key, given in value.items():
        try:
            found[key] = number(given, above=0, below=1 if key == "quantile" else None, most=MOST)
        except UserError as error:
            raise UserError(f"setting {key!r} {error.sentence}", loc=(key,)) from None
    return Quantile(**found)


def _bits(value: Any) -> int:
    found = number(value, least=1, most=16)
    if found != int(found):
        raise UserError(f"is {value!r}; expected a whole number from 1 to 16")
    return int(found)


def _release(value: Any) -> tuple[tuple[str, Any], ...]:
    """``name``, ``{name: setting}`` or a list of them: registered post-noise operations, in order."""
    items = value if isinstance(value, list) else [value]
    out: list[tuple[str, Any]] = []
    for item in items:
        pairs = item.items() if isinstance(item, Mapping) else [(item, None)]
        for name, setting in pairs:
            if not isinstance(name, str):
                raise UserError(f"has {name!r}; expected the name of a release operation")
            out.append((name, setting))
    from dpguard import registry

    known = set(registry.names("dpguard.engine.release")) - {"prune", "quantise"}
    for name, _setting in out:
        if name not in known:
            near = did_you_mean(name, known) or "; none is registered (keep and bits are columns of their own)"
            raise UserError(f"has the unknown release operation {name!r}{near}")
    return tuple(out)


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("train", _flag, "any", "does the client update it (false = frozen)"),
        Column("share", _flag, "any", "does it leave the client (false = withheld)"),
        Column(
            "clip",
            _clip,
            "trained",
            "bound on the L2 norm of one example's gradient over the clip group, or {quantile: .5}",
        ),
        Column("per", _word(PER), "trained", "how the row's parameters form clip groups: row, block, role or tensor"),
        Column("mode", _word(MODES), "trained", "clip = scale down to C, normalise = scale to C"),
        Column("unit", _word(UNITS), "trained", "what is clipped: each example, or the client's whole update once"),
        Column("noise", _noise, "trained", "noise multiplier: std of the sum's noise / clip"),
        Column("noise_std", _noise, "sent", "absolute std per entry on the wire; never a guarantee"),
        Column(
            "keep",
            lambda v: number(v, above=0, most=1),
            "sent",
            "fraction of entries sent, chosen after noise",
        ),
        Column("prune", _word(PRUNE), "sent", "which entries stay: magnitude = the largest, random = a public mask"),
        Column("bits", _bits, "sent", "bits per entry sent, after noise; 1 = sign"),
        Column("release", _release, "sent", "further registered post-noise operations"),
    )
}
_WITH = {"per": "clip", "mode": "clip", "unit": "clip", "prune": "keep"}


def read_row(row: Any, index: int) -> Row:
    """Check one row.

    Raises:
        UserError: not a mapping, no ``layers``, no column, an unknown column or a value out of range; loc =
            ("rows", index, column).

    >>> read_row({"layers": "all", "clip": 1}, 0).columns
    {'clip': 1.0}
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"row {index + 1} is {row!r}; expected a mapping with 'layers' and columns", loc=("rows", index)
        )
    for key in row:
        if key != "layers" and key not in COLUMNS:
            near = did_you_mean(str(key), ["layers", *COLUMNS])
            raise UserError(f"unknown column {key!r}{near}", loc=("rows", index, key))
    layers, listed = _layers(row, index)
    columns = {name: _read(name, row[name], index) for name in COLUMNS if name in row}
    if not columns:
        raise UserError(f"row {index + 1} sets no column; expected one of: {', '.join(COLUMNS)}", loc=("rows", index))
    for name, needed in _WITH.items():
        if name in columns and needed not in columns:
            raise UserError(f"{name} without {needed}; expected both in the same row", loc=("rows", index, name))
    if columns.get("noise") and columns.get("noise_std"):
        raise UserError("noise and noise_std in one row; expected one of them", loc=("rows", index, "noise_std"))
    _check_quantile(columns, index)
    per = columns.pop("per", "row")
    return Row(layers, columns, per, listed)


def _check_quantile(columns: Mapping[str, Any], index: int) -> None:
    if not isinstance(columns.get("clip"), Quantile):
        return
    if columns.get("mode") == "normalise":
        raise UserError(
            "mode is 'normalise' and clip follows a quantile, but normalising scales every example to the bound, "
            "whatever the norms are; expected a number as clip, or mode 'clip'",
            loc=("rows", index, "mode"),
        )
    if columns.get("unit") == "update":
        raise UserError(
            "unit is 'update' and clip follows a quantile, but a client has one update a message and nothing to "
            "count; expected a number as clip, or unit 'example'",
            loc=("rows", index, "unit"),
        )


def _read(name: str, value: Any, index: int) -> Any:
    try:
        return COLUMNS[name].read(value)
    except UserError as error:
        raise UserError(f"{name} {error.sentence}", loc=("rows", index, name, *error.loc)) from None


def _layers(row: Mapping[str, Any], index: int) -> tuple[tuple[str, ...], bool]:
    if "layers" not in row:
        raise UserError(
            f"row {index + 1} has no 'layers'; expected a selector such as 'all' or 'block[3]'",
            loc=("rows", index),
        )
    value = row["layers"]
    listed = isinstance(value, list)
    items = value if listed else [value]
    if not items:
        raise UserError("layers is empty; expected a selector such as 'all'", loc=("rows", index, "layers"))
    for position, item in enumerate(items):
        try:
            selectors.check(item)
        except UserError as error:
            loc: tuple[str | int, ...] = ("rows", index, "layers")
            raise UserError(error.sentence, loc=(*loc, position) if listed else loc) from None
    return tuple(items), listed
