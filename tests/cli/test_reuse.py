"""``dpguard run --reuse`` on a real small study."""

from __future__ import annotations

import pytest

from dpguard.study.record import untimed
from dpguard.study.store import Store
from tests.cli.conftest import write_study


def results(folder):
    with Store.open(folder) as store:
        return {record.cell.id: untimed(record.result) for record in store.records()}


@pytest.mark.slow
def test_a_variation_takes_what_is_the_same_and_gives_the_same_records(home, told, tmp_path):
    path = write_study(home, tmp_path)
    assert told("run", path, "--out", tmp_path / "first", "--workers", "2")[0] == 0
    path = write_study(home, tmp_path, ("name: mine", "name: wider"), ("noise: [0.5]", "noise: [0.5, 2.0]"))
    words = ("run", path, "--out", tmp_path / "wider", "--workers", "2", "--reuse", tmp_path / "first")
    status, said, _err = told(*words, "--dry-run")
    assert status == 0
    assert "9 cells, 3 to run" in said
    status, said, _err = told(*words)
    assert status == 0
    assert "9 cells: 3 done, 6 taken from another folder" in " ".join(said.split())
    assert told("run", path, "--out", tmp_path / "alone", "--workers", "2")[0] == 0
    assert results(tmp_path / "wider") == results(tmp_path / "alone")
    assert "dp-sgd noise=2" in (tmp_path / "wider" / "report.md").read_text()
    status, _out, err = told("run", path, "--only", "dp-sgd noise=2", "--out", tmp_path / "wider", "--dry-run")
    assert status == 2
    assert "holds more policies than are asked for ('dp-sgd noise=0.5' is one)" in err


def test_mistakes_are_one_sentence(home, told, tmp_path):
    path = write_study(home, tmp_path)
    for folder, sentence in (
        ("nowhere", "nowhere' holds no records, expected the folder of a study that was run"),
        ("out", "out' is where this run writes, expected another study's folder"),
    ):
        status, _out, err = told("run", path, "--out", tmp_path / "out", "--reuse", tmp_path / folder)
        assert (status, err.count("\n")) == (2, 1)
        assert sentence in err
