"""Policies by name, and where a policy comes from: a file, a ready-made name, or a selector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpguard.errors import UserError, did_you_mean
from dpguard.policy import layers
from dpguard.policy.sweep import expand
from dpguard.policy.table import Policy


@dataclass(frozen=True)
class Ready:
    """A ready-made policy: its rows and what it is for, in one line."""

    rows: list[dict[str, Any]]
    meaning: str


def _only(selector: str | list[str]) -> list[dict[str, Any]]:
    """Train and share just that; everything else is frozen."""
    return [
        {"layers": "all", "train": False, "share": False},
        {"layers": selector, "train": True, "share": True},
    ]


READY: dict[str, Ready] = {
    "none": Ready([], "share every gradient as it is: the undefended control"),
    "dp-sgd": Ready(
        [{"layers": "all", "clip": 1.0, "noise": 0.8}],
        "clip every example to 1, noise multiplier 0.8 on everything",
    ),
    "clip-only": Ready([{"layers": "all", "clip": 1.0}], "clip every example to 1, no noise (no guarantee)"),
    "prune": Ready([{"layers": "all", "keep": 0.1}], "send the largest 10 % of each gradient (no guarantee)"),
    "last-block": Ready(
        [{"layers": ["embeddings", "block[0:-1]"], "train": False, "share": False}],
        "train and share the last block and what is above it, freeze the rest",
    ),
    "upper-blocks": Ready(
        [{"layers": ["embeddings", "block[0:50%]"], "train": False, "share": False}],
        "train and share the upper half of the blocks and the head, freeze the rest",
    ),
    "no-embeddings": Ready(
        [{"layers": "embeddings", "train": False, "share": False}], "freeze the embeddings, share the rest"
    ),
    "head-only": Ready(_only("head"), "train and share the classification head alone"),
}
NAMES = tuple(READY)


def ready(name: str) -> Policy:
    """A ready-made policy, or a selector as a name (``block[3].attention.query`` shares just that).

    Raises:
        UserError: neither; the sentence names the nearest.

    >>> ready("block[3].attention.query").rows[1]["layers"]
    'block[3].attention.query'
    """
    if name in READY:
        return Policy(READY[name].rows, name)
    try:
        layers.check(name)
    except UserError as error:
        if name.startswith("block["):
            raise UserError(error.sentence) from None
        known = [*NAMES, "block[3]", "embeddings", "block[*].attention.query"]
        raise UserError(f"unknown policy {name!r}{did_you_mean(name, known)}") from None
    return Policy([] if name == "all" else _only(name), name)


def load(source: str | Path) -> Policy:
    """See `Policy.load`."""
    if isinstance(source, Path) or str(source).endswith((".yaml", ".yml")):
        return _from_file(Path(source))
    return ready(str(source))


def _from_file(path: Path) -> Policy:
    from dpguard.documents import Document

    document = Document.read(path)
    with document.locating():
        if "policies" in document.data:
            raise UserError("this is a study, with several policies; expected a file of one policy, or the name of one")
        policies = expand(str(document.data.get("name", path.stem)), document.data)
        if len(policies) > 1:
            raise UserError("sweep makes several policies; expected one (sweeps belong in a study)", loc=("sweep",))
        if policies[0].open:
            raise UserError("blocks in a sweep and optional rows depend on the model; expected them in a study")
        return policies[0].policy
