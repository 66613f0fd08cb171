"""Answers without texts: what is in them, what is not, and that they serve where records would."""

from __future__ import annotations

import json
import sqlite3
import zlib
from contextlib import closing

import pytest

from dpguard.errors import UserError
from dpguard.study.answers import wordless, write_answers
from dpguard.study.merge import merge
from dpguard.study.record import Cell, Record
from dpguard.study.store import ANSWERS, FILE, Store
from dpguard.study.todo import Todo
from tests.study.test_runner import go


@pytest.fixture
def passed_on(kit, tmp_path):
    """A folder with nothing but the answers of a study one cell of which failed, and the study's own folder."""
    go(kit, tmp_path / "mine", script={"utility, dp-sgd noise=0.6, seed 0": "raise"})
    assert write_answers(tmp_path / "mine", tmp_path / "theirs" / ANSWERS) == len(kit.cells())
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [ANSWERS]
    return tmp_path / "mine", tmp_path / "theirs"


def done_in(folder):
    with Store.open(folder) as store:
        return list(store.statuses().values()).count("done")


def test_all_answers_and_no_text(passed_on):
    mine, theirs = passed_on
    with Store.open(mine) as store, Store.open(theirs) as copy:
        assert copy.study().yaml == store.study().yaml
        assert copy.planned() == store.planned()
        pairs = list(zip(copy.records(), store.records(), strict=True))
        assert all((one.cell, one.status, one.result) == (two.cell, two.status, two.result) for one, two in pairs)
        assert {one.reason for one, two in pairs if two.status == "skipped"} == {"the cell that it needs failed"}
        texts = [row.text for r in store.records() for row in store.texts(r.cell.id)]
        assert texts
        assert not any(copy.texts(r.cell.id) for r in copy.records())
        [failed] = store.failed()
        assert failed.provenance["traceback"]
        assert failed.reason == "ValueError: a deliberate failure"
    everything = inside(theirs / ANSWERS)
    assert "dp-sgd noise=0.6" in everything
    assert "deliberate" not in everything
    assert "Traceback" not in everything
    assert not [text for text in texts if text in everything]
    assert [text for text in texts if text in inside(mine / FILE)]


@pytest.mark.parametrize(
    ("failure", "reason", "told"),
    [
        ("raised", "ValueError: cannot align 'Ada was seen'", "ValueError, whose words may quote a text"),
        ("raised", "table.yaml:3: clip is 'x', expected a number", "table.yaml:3: clip is"),
        ("time limit", "took longer than 3 s", "took longer than 3 s"),
    ],
)
def test_an_errors_words_are_no_sentence_of_ours(failure, reason, told):
    cell = Cell("leakage", "none", [], {"name": "m"}, {"name": "d"}, {}, 0)
    found = wordless(Record(cell, "failed", reason, provenance={"failure": failure}))
    assert found.reason.startswith(told)
    assert "Ada" not in found.reason


def inside(file):
    """Everything that a database holds, unpacked."""
    with closing(sqlite3.connect(file)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for table in tables for row in connection.execute(f"SELECT * FROM {table}")]
    values = [zlib.decompress(v).decode() if isinstance(v, bytes) else str(v) for row in rows for v in row]
    return "\n".join(json.loads(v) if v.startswith('"') else v for v in values)


def test_where_the_texts_lie_is_not_passed_on(tmp_path):
    spec = {"name": "s", "data": {"path": "/home/alice/clinic/notes.jsonl", "test": None}, "model": "/home/alice/bert"}
    with Store.open(tmp_path / "mine", create=True) as store:
        store.set_study("s", "name: s", spec, [])
    write_answers(tmp_path / "mine", tmp_path / "theirs" / ANSWERS)
    assert "alice" not in inside(tmp_path / "theirs" / ANSWERS)
    assert "alice" in inside(tmp_path / "mine" / FILE)


def test_a_run_in_their_folder_begins_with_them(kit, passed_on):
    """Nothing known is run again, and what is then passed on holds no less."""
    _, theirs = passed_on
    done = done_in(theirs)
    assert Store.begun(theirs)
    assert Todo.ahead(kit.cells(), theirs).cells == ()
    summary = go(kit, theirs, retry_failed=True)
    assert (summary.resumed, summary.done) == (done, len(kit.cells()) - done)
    assert write_answers(theirs) == len(kit.cells())
    with Store.open(theirs) as store:
        assert store.file.name == FILE
        assert {record.status for record in store.records()} == {"done"}


def test_merged_with_the_folder_itself_texts_stay(kit, passed_on, tmp_path):
    mine, theirs = passed_on
    for number, folders in enumerate(([mine, theirs], [theirs, mine])):
        found = merge(tmp_path / str(number), folders)
        assert found.done == done_in(mine)
        with Store.open(mine) as one, Store.open(tmp_path / str(number)) as both:
            assert all(one.texts(r.cell.id) == both.texts(r.cell.id) for r in one.records())


def test_a_study_goes_on_from_them(kit, passed_on, tmp_path):
    mine, theirs = passed_on
    done = done_in(mine)
    summary = go(kit, tmp_path / "new", reuse=[theirs])
    assert (summary.taken, summary.done) == (done, len(kit.cells()) - done)
    assert (theirs / ANSWERS).is_file()
    assert not (theirs / FILE).exists()


def test_records_of_ones_own_come_first(kit, passed_on):
    mine, _ = passed_on
    assert write_answers(mine) == len(kit.cells())
    go(kit, mine, retry_failed=True)
    with Store.open(mine) as store:
        assert not store.failed()
        assert any(store.texts(r.cell.id) for r in store.records())


def test_records_are_not_replaced_by_a_copy_without_texts(passed_on):
    mine, _ = passed_on
    with pytest.raises(UserError, match="would replace the records themselves"):
        write_answers(mine, mine / FILE)
    with pytest.raises(UserError, match="holds no records"):
        write_answers(mine / "nowhere")
