"""``dpguard records``: what a study measured, as a table for other tools."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from dpguard.cli.folder import Folder
from dpguard.study.record import Record

app = typer.Typer(help="A study's records as tables for other tools.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def records() -> None:
    """A study's records as tables for other tools."""


@app.command()
def export(
    folder: Folder,
    to: Annotated[Optional[str], typer.Option("--to", help="parquet, csv or jsonl [as --out ends, parquet].")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", help="File to write [DIR/WHAT.parquet].")] = None,  # noqa: UP045
    what: Annotated[
        str, typer.Option("--what", help="metrics: a row a cell and metric; scores: a row a target and metric.")
    ] = "metrics",
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Write the users' private sentences, true and recovered, to scores.")
    ] = False,
) -> None:
    """Write the records as one tidy table; no cell is dropped."""
    from dpguard.cli.console import console
    from dpguard.report import tidy
    from dpguard.report.export import kind_of, write

    kind = kind_of(out, to)
    frame = tidy.load(folder, what, show_text=show_text, watch=_watched)
    file = out or folder / f"{what}.{kind}"
    write(frame, file, kind)
    cells = frame.drop_duplicates("id").status.value_counts()
    counts = ", ".join(f"{cells[status]} {status}" for status in ("failed", "skipped", "missing") if status in cells)
    told = f"{len(frame):,} rows of {frame['id'].nunique():,} cells" + (f" ({counts})" if counts else "")
    console().print(f"{told}: {file}", markup=False, soft_wrap=True)


@app.command()
def share(
    folder: Folder,
    out: Annotated[Optional[Path], typer.Option("--out", help="File to write [DIR/answers.sqlite].")] = None,  # noqa: UP045
) -> None:
    """Write all answers without any text, for others' reports and for run --reuse.

    Holds scores, and predictions and labels of the test texts by their place; no sentence, true or recovered.
    """
    from dpguard.cli.console import console
    from dpguard.study.answers import placed, write_answers
    from dpguard.study.store import ANSWERS

    count = write_answers(folder, out)
    for path in placed(folder):
        told = f"the study file names {path!r}, and so do the answers; with ${{PLACE}}/... in it they would not"
        print(told, file=sys.stderr)
    told = f"{count:,} answers without texts: {out or folder / ANSWERS}"
    console().print(told, markup=False, soft_wrap=True)


def _watched(found: Sequence[Record]) -> Iterable[Record]:
    from dpguard.cli.progress import bar

    return bar(found, "reading records")
