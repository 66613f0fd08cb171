"""The map: what sharing just one part of the model leaks, and what training just that is worth. From tables alone.

Which policies belong to it follows from their tables: those that share one block, one role of a block, or one part
outside the blocks, as it is, and freeze or withhold everything else. Roles are those of `policy.layers`, so every way
to write a selector means the same here as anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from dpguard.errors import UserError
from dpguard.policy.layers import ROLES, Slot, select
from dpguard.report.board import Frontier, Row
from dpguard.stats import Interval

INSIDE = (
    "", "attention", "attention.query", "attention.key", "attention.value", "attention.qkv", "attention.output",
    "mlp", "mlp.in", "mlp.gate", "mlp.out", "norms", "adapters",
)  # fmt: skip
"""What a block is made of, in the order of the map's columns; the empty one is the whole block."""
OUTSIDE = (
    "embeddings", "embeddings.token", "embeddings.position", "embeddings.type", "embeddings.norm", "pooler", "head",
)  # fmt: skip
WHOLE = "whole"
PLAIN = {"layers", "train", "share"}
"""Columns that change nothing about what is sent, but whether it is."""
LEAST = 2
"""With fewer cells than this there is no map."""


@dataclass(frozen=True)
class MapCell:
    """One part of the model, shared alone.

    Attributes:
        number: the policy's row in the frontier table, from 1.
        policy: its name.
        leakage: of the study's metric.
        leakage_at: position in the training -> largest mean over attacks there.
        guessed: no attack could run, so that the leakage is a guess's.
        utility: when only that is trained; None when other parts train too, or when it was not measured.
        share: the part's share of all parameters.
    """

    number: int
    policy: str
    leakage: Interval | None
    utility: Interval | None
    share: float | None
    leakage_at: Mapping[str, float] = field(default_factory=dict)
    guessed: bool = False


@dataclass(frozen=True)
class Map:
    """A grid of places; a place without a cell has no record.

    Attributes:
        rows: blocks, and the parts outside them.
        columns: roles, ``whole`` first.
        cells: (row, column) -> cell.
        leakage_metric, utility_metric: of the study.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], MapCell]
    leakage_metric: str
    utility_metric: str

    @property
    def positions(self) -> tuple[str, ...]:
        """Positions in the training at which more than one of the parts was attacked, in their order."""
        found = [at for cell in self.cells.values() for at in cell.leakage_at]
        return tuple(at for at in dict.fromkeys(found) if found.count(at) > 1)

    @property
    def places(self) -> list[tuple[str, str]]:
        """Every place of the grid: roles of blocks, and the whole of what is outside them."""
        return [(r, c) for r in self.rows for c in self.columns if r.startswith("block ") or c == WHOLE]


def map_content(frontier: Frontier) -> Map | None:
    """The map, or None when fewer than `LEAST` policies share a single part as it is."""
    blocks = 1 + max((int(n) for part in frontier.parts for n in re.findall(r"^block\D*(\d+)", part)), default=-1)
    cells: dict[tuple[str, str], MapCell] = {}
    for number, row in enumerate(frontier.rows, 1):
        found = _place(row, blocks)
        if found is None:
            continue
        place, alone = found
        cell = MapCell(
            number, row.policy, row.leakage, row.utility if alone else None, row.shared_fraction,
            dict(row.leakage_at), row.guessed,
        )  # fmt: skip
        if place not in cells or _leaks(cell) > _leaks(cells[place]):
            cells[place] = cell
    if len(cells) < LEAST:
        return None
    order = [*OUTSIDE[:5], *(f"block {n}" for n in range(blocks)), *OUTSIDE[5:]]
    inside = any(row.startswith("block ") for row, _ in cells)
    rows = [name for name in order if (inside and name.startswith("block ")) or any(r == name for r, _ in cells)]
    columns = [name or WHOLE for name in INSIDE if any(c == (name or WHOLE) for _, c in cells)]
    return Map(tuple(rows), tuple(columns), cells, frontier.leakage_metric, frontier.utility_metric)


def _leaks(cell: MapCell) -> float:
    return cell.leakage.high if cell.leakage else -1.0


def _place(row: Row, blocks: int) -> tuple[tuple[str, str], bool] | None:
    """Where on the map a policy is, and whether only that part trains; None when it has no place there."""
    if not row.table or any(set(line) - PLAIN for line in row.table):
        return None
    slots = _slots(blocks)
    shared, trained = set(slots), set(slots)
    for line in row.table:
        try:
            named = _named(line.get("layers", "all"), slots)
        except UserError:
            return None
        for key, kept in (("share", shared), ("train", trained)):
            if key in line:
                kept.update(named) if line[key] else kept.difference_update(named)
    sent = shared & trained
    for name in OUTSIDE:
        if sent == _named(name, slots):
            return (name, WHOLE), trained == sent
    owners = {slot.block for slot in sent}
    if len(owners) == 1 and None not in owners:
        [block] = owners
        for name in INSIDE:
            if sent == _named(f"block[{block}].{name}".rstrip("."), slots):
                return (f"block {block}", name or WHOLE), trained == sent
    return None


@lru_cache(maxsize=4)
def _slots(blocks: int) -> list[Slot]:
    """A stand-in for the model: one parameter for every role, in every block and outside."""
    outside = {"token_embedding", "position_embedding", "type_embedding", "embedding_norm", "pooler", "head", "norm"}
    slots = [Slot(f"{role}.weight", (1,), role) for role in ROLES if role in outside]
    inside = [role for role in ROLES if role not in outside or role == "norm"]
    return slots + [Slot(f"{n}.{role}.weight", (1,), role, n) for n in range(blocks) for role in inside]


def _named(layers: str | Sequence[str], slots: Sequence[Slot]) -> set[Slot]:
    selectors = [layers] if isinstance(layers, str) else layers
    if any(str(selector).startswith("name:") or str(selector).endswith((".weight", ".bias")) for selector in selectors):
        raise UserError("names and single kinds of parameters have no place on the map")
    return {slot for selector in selectors for slot in select(selector, slots)}
