"""Files written beside their place and moved there: a reader, or a second writer, never sees half a file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write; what is there at the end takes the place of ``path``, and nothing is left after an error.

    Raises:
        OSError: the folder cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a text (UTF-8, as it is) or bytes; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


def meant(name: str) -> str:
    """The file that a name was written for.

    >>> meant("report.html.123.part"), meant("report.html")
    ('report.html', 'report.html')
    """
    return re.sub(r"\.\d+\.part$", "", name)
