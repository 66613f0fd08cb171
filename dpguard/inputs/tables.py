"""Rows of jsonl, csv and parquet files, each with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpguard.errors import UserError, did_you_mean

T = TypeVar("T")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class NoColumnError(UserError):
    """A column that is not there; whoever asked for it adds how to name another.

    Attributes:
        column: what was asked for.
        instead: what to name instead, "" where no column is left.
    """

    def __init__(self, column: str, known: Sequence[str], asked: Collection[str], where: str) -> None:
        said = did_you_mean(column, known)
        super().__init__(f"no column {column!r}{said}", where=where)
        left = [name for name in known if name not in asked]
        near = [name for name in left if said == f"; did you mean {name!r}?"] or left
        self.column = column
        self.instead = near[0] if len(near) == 1 else "COLUMN" * bool(near)

    def __reduce__(self) -> tuple[type[UserError], tuple[str], dict[str, Any]]:
        return UserError, (self.sentence,), {"where": self.where}  # between processes the sentence is enough

    def told(self, how: Callable[[str], str]) -> UserError:
        """The same mistake with ``how`` to name the column, where there is one to name."""
        more = f" (name it with {how(self.instead)})" if self.instead else ""
        return UserError(f"{self.sentence}{more}", where=self.where)


def rows(path: Path, columns: Sequence[str], more: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and the row as column -> value, in the file's order.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file.
        columns: what every row must have.
        more: what is read as well where it is there.

    Raises:
        UserError: another kind of file, one that can't be read or holds no row, or a row without a column, with
            file and line.
    """
    readers: dict[str, Callable[[Path], Iterable[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _jsonl, ".json": _jsonl, ".csv": partial(_csv, columns), ".tsv": partial(_csv, columns),
        ".parquet": partial(_parquet, columns, more),
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"is a {path.suffix or 'nameless'} file; expected .jsonl, .csv or .parquet", where=str(path))
    count = 0
    for line, row in reader(path):
        where = f"{path}:{line}"
        check_columns(columns, [str(key) for key in row], where)
        count += 1
        yield where, row
    if count == 0:
        raise UserError("has no rows; expected at least one text", where=str(path))


def check_columns(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    """Refuse a row without one of ``columns``.

    Raises:
        NoColumnError: the first that is missing.
    """
    for column in columns:
        if column not in known:
            raise NoColumnError(column, known, columns, where)


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", type(error).__name__)
            raise UserError(f"is no JSON ({why}); expected one object a line", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise UserError(f"holds {str(row)[:40]!r}; expected one JSON object a line", where=f"{path}:{number}")
        yield number, row


def _csv(columns: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the module's own refuses a text of more than 131,072 characters
    comma = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(_lines(path), delimiter=comma, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"has two columns {twice!r}; expected each name once", where=f"{path}:1")
        if names:
            _check_header(columns, names, comma, f"{path}:1")
        for row in reader:
            if None in row:
                raise UserError(
                    f"has more fields than {len(names)} columns; expected quotes around a text that holds {comma!r}",
                    where=f"{path}:{reader.line_num}",
                )
            if comma == "\t" and any(mark in value for value in row.values() if value for mark in "\t\r\n"):
                raise UserError(
                    "has a tab or a line break between quotes, and in most .tsv files quotes mean nothing; expected "
                    "texts without either, or a .jsonl file",
                    where=f"{path}:{reader.line_num}",
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"is no CSV ({error}); expected quotes that close, or a .jsonl file", where=f"{path}:{reader.line_num}"
        ) from None


def _check_header(columns: Sequence[str], names: Sequence[str], comma: str, where: str) -> None:
    """A header without a column is told before any row is; one that another mark separates is told as that."""
    missing = [column for column in columns if column not in names]
    other = next((mark for mark in SEPARATORS if mark != comma and mark in names[0]), None)
    if missing and len(names) == 1 and other:
        raise UserError(f"looks separated by {other!r}; expected {SEPARATORS[comma]}", where=where)
    check_columns(columns, names, where)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 ({error.reason}); expected UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); expected a file of texts", where=str(path)) from None


def _parquet(columns: Sequence[str], more: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import parquet

    names = _read_by_arrow(path, lambda: parquet.read_schema(path).names)
    check_columns(columns, names, f"{path}:1")
    # others may be large, or of a kind that Python has no value for
    wanted = [name for name in dict.fromkeys((*columns, *more)) if name in names]
    yield from enumerate(_read_by_arrow(path, lambda: parquet.read_table(path, columns=wanted).to_pylist()), 1)


def _read_by_arrow(path: Path, read: Callable[[], T]) -> T:
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"is no parquet file that can be read ({why})", where=str(path)) from None
