"""Answers without texts: what is in them, what is not, and that they serve where records would."""

from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.study.answers import write_answers
from dpguard.study.store import ANSWERS, FILE, Store
from tests.study.test_runner import go


@pytest.fixture
def passed_on(kit, tmp_path):
    """A folder with nothing but the answers of a study one cell of which failed, and the study's own folder."""
    go(kit, tmp_path / "mine", script={"utility, dp-sgd noise=0.6, seed 0": "raise"})
    assert write_answers(tmp_path / "mine", tmp_path / "theirs" / ANSWERS) == len(kit.cells())
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [ANSWERS]
    return tmp_path / "mine", tmp_path / "theirs"


def test_all_answers_and_no_text(passed_on):
    mine, theirs = passed_on
    with Store.open(mine) as store, Store.open(theirs) as copy:
        assert copy.study().yaml == store.study().yaml
        assert copy.planned() == store.planned()
        assert [(r.cell, r.status, r.reason, r.result) for r in copy.records()] == [
            (r.cell, r.status, r.reason, r.result) for r in store.records()
        ]
        texts = [row.text for r in store.records() for row in store.texts(r.cell.id)]
        assert texts
        assert not any(copy.texts(r.cell.id) for r in copy.records())
        [failed] = store.failed()
        assert failed.provenance["traceback"]
        assert "traceback" not in copy.failed()[0].provenance


def test_a_study_goes_on_from_them(kit, passed_on, tmp_path):
    mine, theirs = passed_on
    with Store.open(mine) as store:
        done = sum(status == "done" for status in store.statuses().values())
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
