"""One way to print: tables that fit the terminal, 100 columns at most; plain when it is not one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@cache
def console() -> Console:
    """Standard output: at most 100 columns wide; 100 when it is no terminal."""
    width = Console().width if sys.stdout.isatty() else 100
    return Console(width=min(width, 100), highlight=False, soft_wrap=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; columns named in ``right`` are aligned to the right; no markup is interpreted."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        out.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out
