"""Rows of jsonl, csv and parquet files, each with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpguard.errors import UserError, did_you_mean


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and the row as column -> value, in the file's order.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file.
        columns: what every row must have.

    Raises:
        UserError: another kind of file, one that can't be read or holds no row, or a row without a column, with
            file and line.
    """
    readers: dict[str, Callable[[Path], Iterable[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"is a {path.suffix or 'nameless'} file; expected .jsonl, .csv or .parquet", where=str(path))
    count = 0
    for line, row in reader(path):
        where = f"{path}:{line}"
        for column in columns:
            if column not in row:
                raise UserError(f"no column {column!r}{did_you_mean(column, [str(k) for k in row])}", where=where)
        count += 1
        yield where, row
    if count == 0:
        raise UserError("has no rows; expected at least one text", where=str(path))


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


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the module's own refuses a text of more than 131,072 characters
    comma = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(_lines(path), delimiter=comma, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"has two columns {twice!r}; expected each name once", where=f"{path}:1")
        for row in reader:
            if None in row:
                raise UserError(
                    f"has more fields than {len(names)} columns; expected quotes around a text that holds {comma!r}",
                    where=f"{path}:{reader.line_num}",
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"is no CSV ({error}); expected quotes that close, or a .jsonl file", where=f"{path}:{reader.line_num}"
        ) from None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 ({error.reason}); expected UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); expected a file of texts", where=str(path)) from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"is no parquet file that can be read ({why})", where=str(path)) from None
    yield from enumerate(rows, 1)
