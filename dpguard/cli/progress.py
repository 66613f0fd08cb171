"""A progress bar with a remaining time, quiet when standard error is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def bar(items: Sequence[T], what: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items, showing how many are done and how long the rest will take."""
    if quiet or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    tracked: Iterable[T] = track(items, description=what, console=Console(stderr=True), transient=True)
    yield from tracked
