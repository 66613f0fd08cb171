"""Shards of a real small study: merged they are the one run, apart their report says what is missing."""

from __future__ import annotations

import pytest

from dpguard.study.record import untimed
from dpguard.study.store import Store
from tests.cli.conftest import write_study as study


def contents(folder):
    with Store.open(folder) as store:
        records = [(r.cell, r.status, r.reason, untimed(r.result)) for r in store.records()]
        return records, [store.texts(record[0].id) for record in records]


def test_merged_shards_are_the_one_run(home, told, tmp_path):
    path = study(home, tmp_path, ("targets: 2", "targets: 2, at: [start, end]"))
    assert told("run", path, "--out", tmp_path / "whole", "--workers", "2")[0] == 0
    folders = [tmp_path / f"part-{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        status, said, _err = told("run", path, "--out", folder, "--workers", "2", "--shard", f"{index}/2")
        assert status == 0
        assert f"shard {index}/2: 4 of the study's 8 cells are not its own; dpguard merge OUT" in said
        assert "report:" not in said

    assert told("report", folders[0])[0] == 0
    page = (folders[0] / "report.md").read_text()
    assert "4 results missing" in page
    assert "utility missing for dp-sgd noise=0.5" in page
    assert "no cell of this policy has run" in page
    status, said, _err = told("merge", tmp_path / "half", folders[0])
    assert status == 1
    assert "8 cells from 1 folder: 4 done, 4 missing (the first: " in said

    status, said, _err = told("merge", tmp_path / "merged", *folders)
    assert status == 0
    assert "8 cells from 2 folders: 8 done" in said
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert (tmp_path / "merged" / "frontier.csv").read_text() == (tmp_path / "whole" / "frontier.csv").read_text()


def test_the_dry_run_of_a_shard_counts_its_own_cells(home, told, tmp_path):
    path = study(home, tmp_path)
    status, said, _err = told("run", path, "--out", tmp_path / "out", "--dry-run", "--shard", "1/3")
    assert status == 0
    assert "2 cells of this shard, 2 to run" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "{study}", "--shard", "2/2"), "--shard is '2/2', which is out of range, expected 0/2 to 1/2"),
        (("merge", "{tmp}/out", "{tmp}/nowhere"), "nowhere' holds no records, expected the folder of a study"),
        (("merge", "{tmp}/out"), "Missing argument 'DIR...'"),
    ],
)
def test_mistakes_are_one_sentence(home, told, tmp_path, words, sentence):
    path = study(home, tmp_path)
    status, _out, err = told(*(word.format(study=path, tmp=tmp_path) for word in words))
    assert (status, err.count("\n")) == (2, 1)
    assert sentence in err
