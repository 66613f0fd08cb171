"""A tidy table as a file: Parquet, CSV or JSON lines; written beside its place and moved there, never half a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dpguard.errors import UserError, did_you_mean
from dpguard.report.files import replacing
from dpguard.report.text import csv_cell
from dpguard.study import lock, store

KINDS = ("parquet", "csv", "jsonl")


def kind_of(file: Path | None, asked: str | None) -> str:
    """The format: the one that was asked for, else the file's ending, else Parquet.

    >>> kind_of(Path("x.csv"), None), kind_of(None, None), kind_of(Path("x.txt"), "jsonl")
    ('csv', 'parquet', 'jsonl')

    Raises:
        UserError: a format or an ending that is none of `KINDS`, or two that contradict each other.
    """
    if asked is not None:
        if asked not in KINDS:
            raise UserError(f"--to is {asked!r}{did_you_mean(asked, KINDS)}")
        if file is not None and (ending := file.suffix.removeprefix(".").lower()) in KINDS and ending != asked:
            raise UserError(f"--to is {asked!r} and --out {str(file)!r}, expected a name that ends in .{asked}")
        return asked
    if file is None:
        return KINDS[0]
    ending = file.suffix.removeprefix(".").lower()
    if ending not in KINDS:
        raise UserError(f"--out is {str(file)!r}, expected a name that ends in .parquet, .csv or .jsonl, or --to")
    return ending


def write(frame: pd.DataFrame, file: Path, kind: str) -> None:
    """Write a table; an earlier file of that name is replaced when the new one is whole.

    Args:
        frame: see `tidy.load`.
        file: where to.
        kind: one of `KINDS`. In CSV, infinity is ``inf``, a missing value is empty, and text that a spreadsheet
            would run as a formula gets a leading apostrophe; in JSON lines, infinity is the text "inf" and a
            missing value is null.

    Raises:
        UserError: the file is part of a store, or cannot be written.
    """
    if file.name.startswith((store.FILE, store.ANSWERS, lock.LOCK)):
        raise UserError(f"--out is {str(file)!r}, which would replace the records themselves, expected another name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            if kind == "parquet":
                frame.to_parquet(part, index=False)
            else:
                part.write_text(_csv(frame) if kind == "csv" else _jsonl(frame), "utf-8")
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written ({error.strerror or error}), expected room for it") from None


def _csv(frame: pd.DataFrame) -> str:
    shown = frame.copy()
    for name in shown.columns:
        if shown[name].dtype == "string" or shown[name].dtype == object:
            shown[name] = [value if pd.isna(value) else csv_cell(value) for value in shown[name].astype(object)]
    return shown.to_csv(index=False, lineterminator="\n")


def _jsonl(frame: pd.DataFrame) -> str:
    rows = zip(*(frame[name].astype(object) for name in frame.columns), strict=True)
    lines = [json.dumps(dict(zip(frame.columns, map(_plain, row), strict=True)), ensure_ascii=False) for row in rows]
    return "".join(line + "\n" for line in lines)


def _plain(value: Any) -> Any:
    if pd.isna(value):
        return None
    value = value.item() if hasattr(value, "item") else value
    return f"{value}" if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
