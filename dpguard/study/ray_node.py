"""A cell in its Ray task: run as at home, in a process of its own under the study's limits. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.execution import failed
from dpguard.study.executor import Answer, Limits
from dpguard.study.lock import LOCK
from dpguard.study.ray_cells import versions
from dpguard.study.record import Cell
from dpguard.study.workers import Workers, warm_up


def perform(plain: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run a cell and give its record and texts as plain data.

    Args:
        plain: the cell.
        asked: what the driver asks of all cells: ``execute``, ``context``, ``limits``, ``threads``, ``preload`` and the
            ``versions`` that must be here too.
    """
    cell = Cell(**plain)
    record, texts = _differing(cell, asked["versions"]) or _run(cell, asked)
    if record.status == "failed":
        record = dataclasses.replace(record, reason=f"{record.reason} (on node {socket.gethostname()})")
    return {
        "status": record.status,
        "reason": record.reason,
        "result": record.result,
        "provenance": {**record.provenance, "node": socket.gethostname()},
        "texts": [dataclasses.asdict(row) for row in texts],
    }


def _differing(cell: Cell, expected: Mapping[str, str]) -> Answer | None:
    """The answer of a node whose libraries differ: other versions could give other records."""
    for name, here in versions().items():
        if here != expected[name]:
            return failed(cell, "raised", f"this node has {name} {here}, expected {expected[name]} as the driver has")
    return None


def _run(cell: Cell, asked: Mapping[str, Any]) -> Answer:
    context = {**asked["context"], "folder": _folder(asked["context"].get("folder", ""))}
    warm_up(asked["preload"], asked["threads"])
    workers = Workers(
        asked["execute"], context, 1, limits=Limits(**asked["limits"]), threads=asked["threads"], devices=_devices()
    )
    never, ring = os.pipe()
    try:
        workers.start(cell)
        answers: list[Answer] = []
        while not answers:
            answers = workers.wait(never)
        return answers[0]
    finally:
        workers.close()
        os.close(never)
        os.close(ring)


def _folder(shared: str) -> str:
    """The study's folder if this node sees it, else one of its own for weights and cache, which can be made again."""
    if (Path(shared) / LOCK).exists():
        return shared
    name = hashlib.sha256(shared.encode()).hexdigest()[:16]
    own = Path(tempfile.gettempdir()) / f"dpguard-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise UserError(f"{str(own)!r} belongs to another user, expected a folder of one's own for weights")
    return str(own / name)


def _devices() -> list[str]:
    """GPUs that Ray has set aside for this task."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
