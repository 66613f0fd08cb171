"""Work that several cells share, kept by content beside the records: done once, whoever comes first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpguard.study.record import canonical

FOLDER = "cache"


class Cache:
    """Plain data by the content of what it was made from.

    Two cells that need the same entry at the same time both make it, and the second keeps the first's: an entry is
    written beside its place and moved there, so it is never half a file. Deleting the folder costs time, nothing else.

    Args:
        folder: the study's folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Cache(folder).plain({"square of": 3}, lambda: 9), Cache(folder).plain({"square of": 3}, lambda: 0)
    (9, 9)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / FOLDER

    def plain(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What ``make`` gives (plain data), from the cache when an entry of this key is there and readable."""
        path = self.folder / f"{hashlib.sha256(canonical(dict(key)).encode()).hexdigest()[:20]}.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(canonical(made), "utf-8")
        part.replace(path)
        return json.loads(canonical(made))
