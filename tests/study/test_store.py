from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest

from dpguard.errors import UserError
from dpguard.study.record import Cell, Record, TextRow
from dpguard.study.resume import check_inputs
from dpguard.study.store import FILE, Store


def cell(number, policy="none"):
    return Cell("utility", policy, [{"layers": "all", "bits": 8}], {"name": "m"}, {"name": "d"}, {"n": number}, 1)


CELLS = [cell(number) for number in range(4)]


def filled(folder, name="one", cells=CELLS):
    store = Store.open(folder, create=True)
    store.set_study(name, f"name: {name}\n", {"name": name}, cells)
    return store


def test_what_is_put_comes_back(tmp_path):
    record = Record(
        CELLS[1], "done", "", {"x": [1, 2.5, None, "inf"], "é": {"a": True}}, {"seconds": 1.5, "device": "cpu"}
    )
    texts = [TextRow(0, "truth", "a — b"), TextRow(0, "span", ""), TextRow(1, "truth", "=c\n")]
    with filled(tmp_path / "new" / "folder") as store:
        store.put(record, texts)
    with Store.open(tmp_path / "new" / "folder") as store:
        assert store.records() == [record]
        assert store.record(CELLS[1].id) == record
        assert store.record(CELLS[0].id) is None
        assert store.texts(CELLS[1].id) == texts
        assert store.texts(CELLS[0].id) == []
        assert store.planned() == CELLS


def test_the_study_is_kept(tmp_path):
    with Store.open(tmp_path, create=True) as store:
        with pytest.raises(UserError, match="holds no study yet"):
            store.study()
        store.set_study("one", "name: one # é\n", {"name": "one", "data": {"path": "x"}}, CELLS, show_text=True)
    with Store.open(tmp_path) as store:
        info = store.study()
        assert (info.name, info.yaml, info.show_text) == ("one", "name: one # é\n", True)
        assert info.spec == {"name": "one", "data": {"path": "x"}}


def test_a_failed_cell_is_not_finished_and_a_later_record_takes_its_place(tmp_path):
    with filled(tmp_path) as store:
        for one, status in zip(CELLS, ("done", "failed", "skipped"), strict=False):
            store.put(Record(one, status, "r"), [TextRow(0, "truth", status)])
        assert store.done_ids() == {CELLS[0].id, CELLS[2].id}
        assert store.statuses()[CELLS[1].id] == "failed"
        store.put(Record(CELLS[1], "done"), [])
        assert store.done_ids() == {one.id for one in CELLS[:3]}
        assert store.texts(CELLS[1].id) == []


def test_records_come_in_the_order_of_the_plan(tmp_path):
    with filled(tmp_path) as store:
        for one in reversed(CELLS):
            store.put(Record(one, "done"))
        assert [record.cell for record in store.records()] == CELLS


def test_a_changed_study_keeps_its_old_records_and_says_so(tmp_path):
    with filled(tmp_path) as store:
        for one in CELLS:
            store.put(Record(one, "done"))
        store.set_study("one", "", {}, [cell(3, "renamed"), cell(9)])
        assert [record.cell.policy for record in store.records()] == ["renamed"]
        assert {record.cell.id for record in store.ignored()} == {one.id for one in CELLS[:3]}
        store.set_study("one", "", {}, CELLS)
        assert len(store.records()) == 4
        assert store.ignored() == []


def test_another_study_is_refused_and_nothing_is_lost(tmp_path):
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"))
    with (
        Store.open(tmp_path, create=True) as store,
        pytest.raises(
            UserError, match="holds the records of study 'one', expected an empty folder or records of 'two'"
        ),
    ):
        store.set_study("two", "", {}, [])
    with Store.open(tmp_path) as store:
        assert store.study().name == "one"
        assert len(store.records()) == 1


def test_a_number_that_is_not_finite_is_refused_whole(tmp_path):
    with filled(tmp_path) as store:
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.put(Record(CELLS[0], "done", result={"x": float("nan")}), [TextRow(0, "truth", "t")])
        assert store.statuses() == {}
        assert store.texts(CELLS[0].id) == []


def test_a_text_that_no_file_can_hold_is_kept_readable(tmp_path):
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"), [TextRow(0, "span", "a\ud800b")])
        assert store.texts(CELLS[0].id)[0].text == "a?b"


def test_a_closed_store_is_one_file_and_readable_without_a_log(tmp_path):
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"))
        assert (tmp_path / f"{FILE}-wal").exists()
        mode = store._connection.execute("PRAGMA journal_mode").fetchone()
        synchronous = store._connection.execute("PRAGMA synchronous").fetchone()
        assert (mode, synchronous) == (("wal",), (2,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.lock", FILE]
    assert (tmp_path / FILE).read_bytes()[18:20] == b"\x01\x01"  # a rollback-journal file, no log needed


def test_readers_read_while_the_writer_writes(tmp_path):
    with filled(tmp_path) as writer, Store.open(tmp_path) as reader:
        assert reader.records() == []
        writer.put(Record(CELLS[0], "done"))
        assert len(reader.records()) == 1
    with Store.open(tmp_path) as reader:
        assert len(reader.records()) == 1


def test_a_reader_cannot_write(tmp_path):
    filled(tmp_path).close()
    with Store.open(tmp_path) as store, pytest.raises(UserError, match="readonly"):
        store.put(Record(CELLS[0], "done"))


def test_a_second_writer_is_refused_and_names_the_first(tmp_path):
    with filled(tmp_path):
        with pytest.raises(
            UserError, match=rf"is in use by process {os.getpid()} on \S+ since 20\S+, expected a folder"
        ):
            Store.open(tmp_path, create=True)
        code = f"from dpguard.study.store import Store; Store.open({str(tmp_path)!r}, create=True)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in done.stderr
    Store.open(tmp_path, create=True).close()


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="holds no records, expected the folder of a study"):
        Store.open(tmp_path)
    with pytest.raises(UserError, match="holds no records"):
        Store.open(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    (tmp_path / FILE).write_text("precious notes " * 100)
    for create in (True, False):
        with pytest.raises(UserError, match="file is not a database") as caught:
            Store.open(tmp_path, create=create)
        assert "\n" not in str(caught.value)
    assert (tmp_path / FILE).read_text() == "precious notes " * 100


def test_a_database_of_something_else_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(UserError, match="holds no records of a study"):
        Store.open(tmp_path, create=True)


def test_a_newer_schema_is_refused(tmp_path):
    filled(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    other.close()
    for create in (True, False):
        with pytest.raises(UserError, match="has schema 99, made by a newer dpguard, expected at most 3"):
            Store.open(tmp_path, create=create)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    other.close()
    Store.open(tmp_path, create=True).close()  # the refusal let the folder go


def test_a_store_of_format_two_is_read_as_it_is_and_moved_by_its_first_writer(tmp_path):
    rows = [TextRow(5, "truth", "Ann called"), TextRow(5, "span", "Ann called"), TextRow(2, "truth", "")]
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"))
        store.put(Record(CELLS[1], "done"))
    with sqlite3.connect(tmp_path / FILE) as old:
        old.execute("DROP TABLE cell_texts")
        old.execute("CREATE TABLE texts (id, position, target, attack, text, PRIMARY KEY (id, position)) WITHOUT ROWID")
        for position, row in reversed(list(enumerate(rows))):
            old.execute("INSERT INTO texts VALUES (?, ?, ?, ?, ?)", (CELLS[0].id, position, *astuple(row)))
        old.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
    old.close()
    for create in (False, True, False):
        with Store.open(tmp_path, create=create) as store:
            assert store.texts(CELLS[0].id) == rows
            assert store.texts(CELLS[1].id) == []
            assert len(store.records()) == 2
    with sqlite3.connect(tmp_path / FILE) as new:
        assert new.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("3",)
        assert new.execute("SELECT count(*) FROM sqlite_master WHERE name = 'texts'").fetchone() == (0,)
    new.close()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store.open(tmp_path / "file", create=True)


def test_a_full_disk_is_a_sentence_and_keeps_what_is_stored(tmp_path):
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"))
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(UserError, match=r"full.*nothing was deleted"):
            store.put(Record(CELLS[1], "done", result={"x": os.urandom(500_000).hex()}))
        assert store.done_ids() == {CELLS[0].id}


@pytest.mark.parametrize("pragma", ["", "PRAGMA journal_mode=WAL"])
def test_a_folder_where_a_run_ended_as_it_made_the_store_is_one_without_records(tmp_path, pragma):
    (tmp_path / FILE).touch()
    connection = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    connection.execute(pragma)
    connection.close()
    assert not Store.begun(tmp_path)
    check_inputs(SimpleNamespace(text="name: one\n"), tmp_path, CELLS)
    with pytest.raises(UserError, match="holds no records of a study"):
        Store.open(tmp_path)
    with filled(tmp_path) as store:
        assert store.planned() == CELLS
        assert Store.begun(tmp_path)
    (tmp_path / FILE).write_text("no database at all, but long enough to be looked at " * 20)
    with pytest.raises(UserError, match="cannot be used"):
        Store.begun(tmp_path)


def test_half_a_character_from_a_file_name_is_stored_as_a_question_mark(tmp_path):
    reason = "cannot open '/data/\udce9t\udce9.csv'"
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "failed", reason, {"of": {"\udce9": "\udce9"}}))
        found = store.record(CELLS[0].id)
    assert (found.reason, found.result) == ("cannot open '/data/?t?.csv'", {"of": {"?": "?"}})


def test_one_record_too_has_the_policy_name_of_today(tmp_path):
    with filled(tmp_path) as store:
        store.put(Record(CELLS[0], "done"))
        store.put(Record(CELLS[1], "done"))
        renamed = replace(CELLS[0], policy="renamed")
        store.set_study("one", "name: one\n", {"name": "one"}, [renamed])
        assert store.record(CELLS[0].id).cell == renamed
        assert store.record(CELLS[1].id).cell == CELLS[1]  # no longer planned, and kept
