"""One SQLite file with everything that a study found out; nothing in it is ever deleted. No torch here.

One process writes (`Store.open(folder, create=True)` holds a lock on the folder), any number may read.
A record is on the disk when `put` returns: write-ahead log, synchronous FULL. When the writer closes, the
log is folded in, so that the file can be copied, committed or read from a read-only medium.

Records, planned cells and the texts of a cell are kept as compressed JSON, a tenth of its size: 10,000 records are a
file that one can send. Stores of formats 1 (plain JSON) and 2 (a row for every text) are read as they are; the first
writer moves the texts to their new place and says format 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dpguard.errors import UserError
from dpguard.study import lock
from dpguard.study.record import Cell, Record, TextRow, canonical, encodable

FILE = "records.sqlite"
ANSWERS = "answers.sqlite"
"""A copy without texts (`answers.write_answers`): read where there are no records, and what a run there begins with."""
FINISHED = ("done", "skipped")
FORMAT = 3
"""Of the file. What a cell's id hashes has a number of its own (`record.SCHEMA`)."""

_CELL_TEXTS = "CREATE TABLE cell_texts (id TEXT PRIMARY KEY, texts BLOB NOT NULL)"
_TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE plan (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, cell BLOB NOT NULL);
CREATE TABLE records (id TEXT PRIMARY KEY, status TEXT NOT NULL, record BLOB NOT NULL);
{_CELL_TEXTS};
"""
_OLD_TEXTS = "SELECT target, attack, text FROM texts WHERE id = ? ORDER BY position"


@dataclass(frozen=True)
class StudyInfo:
    """What a store knows about its study.

    Attributes:
        name: the study's identity.
        yaml: its file as written.
        spec: the same as plain data, every default filled in.
        show_text: private texts may be shown in the report.
    """

    name: str
    yaml: str
    spec: dict[str, Any]
    show_text: bool


class Store:
    """The records of one study in one folder; a context manager.

    >>> import tempfile
    >>> cell = Cell("utility", "none", [], {"name": "m"}, {"name": "d"}, {"epochs": 1.0})
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(folder, create=True) as store:
    ...     store.set_study("s", "name: s", {"name": "s"}, [cell])
    ...     store.put(Record(cell, "done", result={"steps": 3}))
    ...     store.records()[0].result, store.done_ids() == {cell.id}
    ({'steps': 3}, True)
    """

    def __init__(self, file: Path, connection: sqlite3.Connection, held: IO[str] | None) -> None:
        self.folder, self.file = file.parent, file
        self._connection = connection
        self._lock = held

    @classmethod
    def open(cls, folder: str | Path, *, create: bool = False) -> Store:
        """Open the store of a folder: to read, or with ``create`` to write (made where there is none).

        Where there is none, answers that somebody passed on (`ANSWERS`) are read instead, and a writer begins with
        a copy of them.

        Raises:
            UserError: nothing to read there, no folder, no database, a store of a newer version, or another
                process is writing to it.
        """
        folder = Path(folder)
        file = folder / FILE if create else _there(folder)
        if not create and not file.is_file():
            raise UserError(f"{str(folder)!r} holds no records, expected the folder of a study that was run")
        held = lock.claim(folder) if create else None
        connection: sqlite3.Connection | None = None
        try:
            with explained(file):
                if create:
                    _begin(folder)
                    connection = sqlite3.connect(file, isolation_level=None)
                    connection.execute("PRAGMA journal_mode=WAL")
                    connection.execute("PRAGMA synchronous=FULL")
                else:
                    connection = _reading(file)
                store = cls(file, connection, held)
                store._check_schema(create)
        except BaseException:
            for opened in (connection, held):
                if opened is not None:
                    opened.close()
            raise
        return store

    @staticmethod
    def begun(folder: str | Path) -> bool:
        """Whether there is a store to read: not where a run ended as it made one, for a full disk or a kill.

        Raises:
            UserError: the file is no database.
        """
        file = _there(Path(folder))
        if not file.is_file():
            return False
        with explained(file), contextlib.closing(_reading(file)) as connection:
            return bool(_tables(connection))

    def _check_schema(self, create: bool) -> None:
        tables = _tables(self._connection)
        if not tables and create:
            with self._writing():
                for statement in _TABLES.split(";"):
                    self._connection.execute(statement)
                self._set_meta({"schema": str(FORMAT)})
            return
        if "meta" not in tables or "records" not in tables:
            raise UserError(f"{str(self.file)!r} holds no records of a study, expected a store of dpguard")
        schema = int(self._meta()["schema"])
        if schema > FORMAT:
            raise UserError(
                f"{str(self.file)!r} has schema {schema}, made by a newer dpguard, "
                f"expected at most {FORMAT}: update dpguard to read it"
            )
        if create and schema < FORMAT:
            with self._writing():
                if "texts" in tables:
                    self._move_texts()
                self._set_meta({"schema": str(FORMAT)})

    def _move_texts(self) -> None:
        """From one row for every text (formats 1 and 2) to one for every cell."""
        run = self._connection.execute
        run(_CELL_TEXTS)
        for (cell_id,) in run("SELECT DISTINCT id FROM texts").fetchall():
            rows = [TextRow(*row) for row in run(_OLD_TEXTS, (cell_id,))]
            run("INSERT INTO cell_texts VALUES (?, ?)", (cell_id, _packed_texts(rows)))
        run("DROP TABLE texts")

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Fold the log into the file, and let the folder go."""
        if self._lock is not None:
            # With a reader still there the log stays beside the file, and the next one to close folds it in.
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()
        if self._lock is not None:
            self._lock.close()

    def set_study(
        self, name: str, yaml: str, spec: Mapping[str, Any], cells: Sequence[Cell], *, show_text: bool = False
    ) -> None:
        """Say what study this is and what it plans, in order. Records of cells that it no longer plans stay.

        Raises:
            UserError: the folder holds the records of another study.
        """
        held = self._meta().get("name", name)
        if held != name:
            raise UserError(
                f"{str(self.folder)!r} holds the records of study {held!r}, "
                f"expected an empty folder or records of {name!r}"
            )
        rows = [(position, cell.id, _packed(cell)) for position, cell in enumerate(cells)]
        with self._writing():
            self._set_meta({"name": name, "yaml": yaml, "spec": canonical(spec), "show_text": canonical(show_text)})
            if rows != self._connection.execute("SELECT position, id, cell FROM plan ORDER BY position").fetchall():
                self._connection.execute("DELETE FROM plan")
                self._connection.executemany("INSERT INTO plan VALUES (?, ?, ?)", rows)

    @property
    def named(self) -> bool:
        """Whether it was given a study."""
        return "name" in self._meta()

    def study(self) -> StudyInfo:
        """The study of this folder.

        Raises:
            UserError: the store was made and never given a study.
        """
        meta = self._meta()
        if not self.named:
            raise UserError(f"{str(self.folder)!r} holds no study yet, expected one that was run")
        return StudyInfo(meta["name"], meta["yaml"], json.loads(meta["spec"]), bool(json.loads(meta["show_text"])))

    def planned(self) -> list[Cell]:
        """The cells of the study, in its order, with or without a record."""
        rows = self._rows("SELECT cell FROM plan ORDER BY position")
        return [_cell(_unpacked(cell)) for (cell,) in rows]

    def put(self, record: Record, texts: Sequence[TextRow] = ()) -> None:
        """Store a record and its texts, in place of an earlier record of the same cell.

        Raises:
            UserError: no room left on the disk; what is stored stays.
            ValueError: a number that is not finite.
        """
        self.put_all([(record, texts)])

    def put_all(self, answers: Iterable[tuple[Record, Sequence[TextRow]]]) -> None:
        """Store many records with their texts: all of them, or none.

        Raises:
            UserError, ValueError: as `put`.
        """
        with self._writing():
            for record, texts in answers:
                row = (record.cell.id, record.status, _packed(record))
                self._connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", row)
                self._connection.execute("DELETE FROM cell_texts WHERE id = ?", (record.cell.id,))
                if texts:
                    kept = (record.cell.id, _packed_texts(texts))
                    self._connection.execute("INSERT INTO cell_texts VALUES (?, ?)", kept)

    def records(self) -> list[Record]:
        """The records of the cells that the study plans, in its order, under the policy names of today."""
        rows = self._rows("SELECT record, cell FROM plan JOIN records USING (id) ORDER BY position")
        return [_record(_unpacked(record), _unpacked(cell)) for record, cell in rows]

    def record(self, cell_id: str) -> Record | None:
        """The record of one cell, under the policy name of today if it is planned; None when it has none."""
        rows = self._rows("SELECT record, cell FROM records LEFT JOIN plan USING (id) WHERE id = ?", cell_id)
        return next((_record(_unpacked(record), cell and _unpacked(cell)) for record, cell in rows), None)

    def ignored(self) -> list[Record]:
        """Records that an earlier form of the study left, and that it no longer plans."""
        rows = self._rows("SELECT record FROM records WHERE id NOT IN (SELECT id FROM plan) ORDER BY id")
        return [_record(_unpacked(record)) for (record,) in rows]

    def texts(self, cell_id: str) -> list[TextRow]:
        """True and recovered texts of one cell, in the order in which they were put."""
        if int(self._meta()["schema"]) < FORMAT:
            return [TextRow(*row) for row in self._rows(_OLD_TEXTS, cell_id)]
        rows = self._rows("SELECT texts FROM cell_texts WHERE id = ?", cell_id)
        return [TextRow(*row) for row in _unpacked(rows[0][0])] if rows else []

    def statuses(self) -> dict[str, str]:
        """Cell id -> status, of every record."""
        return dict(self._rows("SELECT id, status FROM records"))

    def failed(self) -> list[Record]:
        """The failed records of the cells that the study plans, in its order."""
        rows = self._rows(
            "SELECT record, cell FROM plan JOIN records USING (id) WHERE status = 'failed' ORDER BY position"
        )
        return [_record(_unpacked(record), _unpacked(cell)) for record, cell in rows]

    def done_ids(self) -> set[str]:
        """Ids of the cells that need not run again: done and skipped ones."""
        return {cell_id for cell_id, status in self.statuses().items() if status in FINISHED}

    def _meta(self) -> dict[str, str]:
        return dict(self._rows("SELECT key, value FROM meta"))

    def _rows(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        with explained(self.file):
            return self._connection.execute(question, values).fetchall()

    def _set_meta(self, values: Mapping[str, str]) -> None:
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of it is on the disk, or none."""
        with explained(self.file):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _there(folder: Path) -> Path:
    """The file to read: the records, or where there are none the answers that were passed on."""
    return folder / (ANSWERS if not (folder / FILE).is_file() and (folder / ANSWERS).is_file() else FILE)


def _begin(folder: Path) -> None:
    """Make a folder's answers its first records, so that what is known is neither run again nor lost."""
    if (file := _there(folder)).name == ANSWERS:
        part = folder / f"{FILE}.part"
        try:
            shutil.copyfile(file, part)
            part.replace(folder / FILE)
        except OSError as error:
            raise UserError(f"{str(folder / FILE)!r} cannot be written ({error.strerror or error})") from None


def _reading(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Say in a sentence what SQLite found wrong with the file or the disk."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        raise UserError(
            f"{str(file)!r} cannot be used ({error}), expected the records of a study and room to write; "
            "nothing was deleted"
        ) from error


def _plain(value: Cell | Record) -> dict[str, Any]:
    """The fields, not copied: `dataclasses.asdict` takes ten times as long for a study of 10,000 cells."""
    plain = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {**plain, "cell": _plain(value.cell)} if isinstance(value, Record) else plain


def _packed(value: Cell | Record) -> bytes:
    return zlib.compress(encodable(canonical(_plain(value))).encode())


def _packed_texts(texts: Sequence[TextRow]) -> bytes:
    rows = [[row.target, row.attack, encodable(row.text)] for row in texts]
    return zlib.compress(canonical(rows).encode())


def _unpacked(kept: str | bytes) -> Any:
    try:
        return json.loads(kept if isinstance(kept, str) else zlib.decompress(kept))
    except (ValueError, zlib.error) as error:
        raise UserError(f"a stored record cannot be read ({error}), expected {FILE} as it was written") from error


def _cell(plain: Mapping[str, Any]) -> Cell:
    return Cell(**plain)


def _record(plain: Mapping[str, Any], cell: Mapping[str, Any] | None = None) -> Record:
    return Record(**{**plain, "cell": _cell(cell or plain["cell"])})
