"""Answers that another study has given already: a cell with the same id is the same question. No torch here.

What an id hashes (`record.Cell.content`) is all that changes a result, so two studies that share a control, or a
policy under another name, need not run it twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.cache import TENSORS, Cache, cache_of, weights_key
from dpguard.study.record import Cell
from dpguard.study.store import Store


def known(folders: Sequence[Path]) -> frozenset[str]:
    """Ids of the cells that are done in any of the folders.

    Raises:
        UserError: a folder without records, or one that cannot be read.
    """
    found: set[str] = set()
    for folder in folders:
        with Store.open(folder) as source:
            found |= _done(source)
    return frozenset(found)


def take(store: Store, cells: Iterable[Cell], folders: Sequence[Path], *, show_text: bool) -> frozenset[str]:
    """Copy the done records of ``cells`` that ``store`` has no answer for, with their texts; the first folder wins.

    Skipped and failed cells are not taken: they may be so because of what their own study lacked.

    Args:
        store: open for writing.
        cells: what its study wants to know.
        folders: of other studies; one that is still running gives what it has finished.
        show_text: whether the report on ``store`` may show private texts.

    Returns:
        Ids of the cells that were taken.

    Raises:
        UserError: as `known`; or texts are to be shown that a folder keeps hidden. Nothing was taken then.
    """
    missing = {cell.id for cell in cells} - store.done_ids()
    answers = []
    for folder in folders:
        with Store.open(folder) as source:
            _check_shown(source, show_text)
            here = missing & _done(source)
            answers += [
                (record, source.texts(cell_id)) for cell_id in sorted(here) if (record := source.record(cell_id))
            ]
            missing -= here
    store.put_all(answers)
    return frozenset(record.cell.id for record, _ in answers)


def take_weights(context: Mapping[str, Any], ids: Collection[str], folders: Sequence[Path]) -> None:
    """Copy the weights that cells ended with, where a folder still has them: no cell trains them again then.

    A federation's weights, of every round that is observed and of every client, are made again.

    Args:
        context: of the study's cells: its folder, the room of its cache, and whose weights are needed.
        ids: cells whose answers were taken.
        folders: of other studies.
    """
    needed = sorted(set(ids).intersection(context.get("keep_weights", ())))
    for cell_id, other in itertools.product(needed, folders):
        cache_of(context).adopt(Cache(other), weights_key(cell_id), TENSORS)


def _done(source: Store) -> set[str]:
    return {cell_id for cell_id, status in source.statuses().items() if status == "done"}


def _check_shown(source: Store, show_text: bool) -> None:
    if show_text and not source.study().show_text:
        raise UserError(
            f"--show-text: {str(source.folder)!r} keeps its texts hidden, expected a run without it, "
            "or without --reuse of that folder"
        )
