"""Several folders of records of one study become one: shards that ran apart, or copies that went on apart.

Everything is read and compared before anything is written, in one transaction. No torch here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpguard.errors import UserError
from dpguard.study.answers import portable
from dpguard.study.grid import describe
from dpguard.study.lock import in_use
from dpguard.study.record import Cell, Record, TextRow, untimed
from dpguard.study.store import Store, StudyInfo, explained

_RANK = {"failed": 0, "skipped": 1, "done": 2}

Answer = tuple[Record, list[TextRow]]


@dataclass(frozen=True)
class Source:
    """One folder, read whole.

    Attributes:
        folder: where it is.
        info: its study.
        planned: the study's cells.
        answers: cell id -> record and texts.
        ignored: records that its study no longer plans; they stay behind.
    """

    folder: Path
    info: StudyInfo
    planned: list[Cell]
    answers: dict[str, Answer]
    ignored: int


@dataclass(frozen=True)
class Merged:
    """What a merge gave.

    Attributes:
        planned: cells of the study.
        done, failed, skipped: of them, by status.
        folders: how many were merged.
        ignored: records left behind, which the study no longer plans.
        missing: cells without a record, in words.
    """

    planned: int
    done: int
    failed: int
    skipped: int
    folders: int
    ignored: int
    missing: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """1 when a cell failed or is missing, else 0."""
        return int(bool(self.failed or self.missing))

    @property
    def sentence(self) -> str:
        """The merge in one sentence.

        >>> Merged(5, 3, 0, 0, 2, 0, ("utility, none, seed 0", "utility, none, seed 1")).sentence
        '5 cells from 2 folders: 3 done, 2 missing (the first: utility, none, seed 0)'
        """
        parts = [f"{self.done} done"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{len(self.missing)} missing (the first: {self.missing[0]})"] if self.missing else []
        text = f"{self.planned} cells from {self.folders} folder{'s' * (self.folders != 1)}: {', '.join(parts)}"
        return text + (f"; {self.ignored} records that the study no longer plans stay behind" if self.ignored else "")


def merge(out: str | Path, folders: Sequence[str | Path]) -> Merged:
    """Merge folders of one study into ``out``, which may hold records of the same study already.

    Of two records of one cell the done one is kept, then the skipped one, then one with its texts, then the first.

    Raises:
        UserError: nothing to read in a folder, a running driver, an unreadable or newer store, another study or
            another form of it, or two done records of one cell that differ in more than timings. Nothing is written.
    """
    out = Path(out)
    paths = [Path(folder) for folder in folders]
    _check_distinct(out, paths)
    sources = [_read(path) for path in paths]
    for other in sources[1:]:
        _check_same(sources[0], other)
    _choose(sources)
    with Store.open(out, create=True) as store:
        held = [_source(store)] if store.named else []
        for other in held:
            _check_same(sources[0], other)
        chosen = _choose([*held, *sources])
        known = {cell_id for source in held for cell_id, answer in source.answers.items() if chosen[cell_id] is answer}
        info, planned = sources[0].info, sources[0].planned
        show_text = all(source.info.show_text for source in (*held, *sources))
        if not held or held[0].info.show_text != show_text:
            store.set_study(info.name, info.yaml, info.spec, planned, show_text=show_text)
        store.put_all([chosen[c.id] for c in planned if c.id in chosen and c.id not in known])
    statuses = [chosen[cell.id][0].status for cell in planned if cell.id in chosen]
    return Merged(
        planned=len(planned),
        done=statuses.count("done"),
        failed=statuses.count("failed"),
        skipped=statuses.count("skipped"),
        folders=len(sources),
        ignored=sum(source.ignored for source in sources),
        missing=tuple(describe(cell) for cell in planned if cell.id not in chosen),
    )


def _check_distinct(out: Path, paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {out.resolve(): out}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{str(path)!r} is named twice, expected OUT and then other folders, each once")
        seen[path.resolve()] = path


def _read(folder: Path) -> Source:
    if holder := in_use(folder):
        raise UserError(f"{str(folder)!r} is in use by {holder}, expected a run that has ended")
    with Store.open(folder) as store:
        return _source(store)


def _source(store: Store) -> Source:
    with _readable(store):
        answers = {record.cell.id: (record, store.texts(record.cell.id)) for record in store.records()}
        return Source(store.folder, store.study(), store.planned(), answers, len(store.ignored()))


@contextlib.contextmanager
def _readable(store: Store) -> Iterator[None]:
    file = store.file
    with explained(file):
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{str(file)!r} cannot be read ({error}), expected the records of a study") from error


def _check_same(one: Source, other: Source) -> None:
    """Refuse another study, another form of it, or the same on another model or other texts."""
    if one.info.name != other.info.name:
        raise UserError(
            f"{str(one.folder)!r} holds study {one.info.name!r} and {str(other.folder)!r} holds {other.info.name!r}, "
            "expected one study"
        )
    found = difference(_asked(one), _asked(other))
    if found is None:
        contents = [[_identity(cell) for cell in source.planned] for source in (one, other)]
        found = difference({"cells": contents[0]}, {"cells": contents[1]})
    if found is not None:
        name, here, there = found
        raise UserError(
            f"the studies differ: {name} is {_short(here)} in {str(one.folder)!r} and {_short(there)} in "
            f"{str(other.folder)!r}, expected one study"
        )


def _asked(source: Source) -> dict[str, Any]:
    """What a folder's study asks; older ones ran with ``--only`` do not say what was left out."""
    return {key: value for key, value in portable(source.info.spec).items() if key != "left_out"}


def _identity(cell: Cell) -> dict[str, Any]:
    return {"policy": cell.policy, **cell.content()}


def _choose(sources: Sequence[Source]) -> dict[str, Answer]:
    chosen: dict[str, Answer] = {}
    homes: dict[str, Source] = {}
    for source in sources:
        for cell_id, answer in source.answers.items():
            held = chosen.get(cell_id)
            if held is not None and held[0].status == answer[0].status == "done":
                _check_equal(held, homes[cell_id], answer, source)
            if held is None or _rank(answer) > _rank(held):
                chosen[cell_id], homes[cell_id] = answer, source
    return chosen


def _rank(answer: Answer) -> tuple[int, bool]:
    """Done before skipped before failed; of equals the one that was not passed on without its texts."""
    return _RANK[answer[0].status], bool(answer[1])


def _check_equal(held: Answer, home: Source, answer: Answer, source: Source) -> None:
    found = difference(untimed(held[0].result), untimed(answer[0].result))
    where = [str(home.folder), str(source.folder)]
    if found is not None:
        name, here, there = found
        told = f"{name} is {_short(here)} in {where[0]!r} and {_short(there)} in {where[1]!r}"
    elif held[1] and answer[1] and held[1] != answer[1]:  # without texts are answers that were passed on
        told = f"the recovered texts differ between {where[0]!r} and {where[1]!r}"
    else:
        return
    cell = held[0].cell
    raise UserError(f"cell {cell.id} ({describe(cell)}) has two records: {told}, expected the same; keep one folder")


def difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two plain values differ: (name, here, there); None when they do not.

    >>> difference({"leakage": {"targets": 3}}, {"leakage": {"targets": 4}})
    ('leakage.targets', 3, 4)
    >>> difference([1, 2], [1])
    ('[1]', 2, 'nothing')
    """
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(f"{name}.{key}" if name else str(key), one.get(key, "nothing"), other.get(key, "nothing"))
                 for key in dict.fromkeys([*one, *other])]  # fmt: skip
    elif isinstance(one, list) and isinstance(other, list):
        longest = range(max(len(one), len(other)))
        pairs = [(f"{name}[{i}]", (one[i:] or ["nothing"])[0], (other[i:] or ["nothing"])[0]) for i in longest]
    else:
        return None if one == other else (name, one, other)
    return next((found for key, here, there in pairs if (found := difference(here, there, key))), None)


def _short(value: Any) -> str:
    shown = value if value == "nothing" else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
