"""A study in n parts that run apart, on Slurm, Kubernetes or CI, and are merged afterwards (`merge`). No torch here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0.

    >>> Shard.parse("0/3")
    Shard(index=0, count=3)
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Raises:
            UserError: another form, or an index that is not below the count.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found:
            raise UserError(f"--shard is {text!r}, expected i/n such as 0/3")
        index, count = int(found[1]), int(found[2])
        if index >= count:
            most = f"0/{count} to {count - 1}/{count}" if count else "at least one shard, such as 0/1"
            raise UserError(f"--shard is {text!r}, which is out of range, expected {most} (counted from 0)")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def cells(self, cells: Sequence[Cell]) -> list[Cell]:
        """The part's cells, in the order of the plan."""
        own = set(split([cell.id for cell in cells], _chains(cells), self.count)[self.index])
        return [cell for cell in cells if cell.id in own]


def split(order: Sequence[str], chains: Sequence[tuple[str, Sequence[str]]], count: int) -> list[list[str]]:
    """Deal chains to ``count`` parts: each part gets as many of every kind as any other, give or take one.

    Args:
        order: all ids, in the order of the plan.
        chains: (kind, ids) of what must stay together, in the order of the plan.
        count: number of parts.

    Returns:
        The ids of each part, in the order of the plan. A function of its arguments alone: every machine deals alike.

    >>> split(["a", "b", "c"], [("one", ["a"]), ("two", ["b", "c"])], 2)
    [['a'], ['b', 'c']]
    """
    kinds: dict[str, list[Sequence[str]]] = defaultdict(list)
    for kind, ids in chains:
        kinds[kind].append(ids)
    parts: list[set[str]] = [set() for _ in range(count)]
    for own in kinds.values():
        turns = [0] * count
        for ids in own:
            part = min(range(count), key=lambda i: (turns[i], len(parts[i]), i))
            turns[part] += 1
            parts[part].update(ids)
    return [[cell for cell in order if cell in part] for part in parts]


def _chains(cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """Cells with those that need their weights, each chain with its kind: the legs in it.

    Attacks at ``tuned`` all start from the one training of the control: in one chain they would be most of a study, so
    they are dealt alone, and each shard trains the control for itself.
    """
    alone = {cell.id for cell in cells if cell.settings.get("at") == "tuned"}
    heads = {cell.id: cell.id if cell.id in alone else str(cell.settings.get(NEEDS, cell.id)) for cell in cells}
    chains: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        head = cell.id
        while heads.get(head, head) != head:
            head = heads[head]
        chains[head].append(cell)
    return [
        (" ".join(sorted(f"{c.leg} {c.settings.get('at', '')}" for c in own)), [c.id for c in own])
        for own in chains.values()
    ]
