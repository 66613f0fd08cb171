"""Merged shards are the study, and what cannot be merged is named before anything is written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3

import pytest

from dpguard.errors import UserError
from dpguard.study.grid import describe
from dpguard.study.merge import merge
from dpguard.study.record import Cell, Record, TextRow
from dpguard.study.runner import run
from dpguard.study.shards import Shard
from dpguard.study.store import FILE, Store


def go(kit, folder, shard=None, script=None, **options):
    study, cells = kit.study(), kit.cells()
    only = None if shard is None else {cell.id for cell in Shard.parse(shard).cells(cells)}
    context = {"script": script or {}}
    options = {"workers": 2, "quiet": True, "only": only, **options}
    return run(study, folder, cells, execute=kit.execute, context=context, **options)


def contents(folder):
    with Store.open(folder) as store:
        records = [(r.cell, r.status, r.reason, r.result) for r in store.records()]
        return store.study(), store.planned(), records, [store.texts(record[0].id) for record in records]


def shards(kit, folder, count=3, script=None):
    folders = [folder / f"shard-{index}" for index in range(count)]
    for index, one in enumerate(folders):
        go(kit, one, f"{index}/{count}", script)
    return folders


CELLS = [Cell("utility", "none", [], {"name": "m"}, {"name": "d"}, {"n": n}, n) for n in range(3)]


def filled(folder, records=(), *, name="one", spec=None, cells=CELLS, texts=(), show_text=False):
    with Store.open(folder, create=True) as store:
        store.set_study(name, f"name: {name}", spec or {"name": name}, cells, show_text=show_text)
        for record in records:
            store.put(record, texts)
    return folder


def done(number=0, value=1.0, **result):
    return Record(CELLS[number], "done", result={"metrics": {"accuracy": value}, **result}, provenance={"seconds": 1})


def test_merged_shards_are_one_run(kit, tmp_path):
    go(kit, tmp_path / "whole")
    folders = shards(kit, tmp_path)
    merged = merge(tmp_path / "merged", folders)
    assert (merged.done, merged.missing, merged.exit_status) == (len(kit.cells()), (), 0)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert go(kit, tmp_path / "merged").resumed == len(kit.cells())


def test_a_shard_plans_the_whole_study_and_counts_its_own(kit, tmp_path):
    summary = go(kit, tmp_path, "1/3")
    assert (summary.planned, summary.failed, summary.interrupted) == (summary.done, 0, False)
    assert 0 < summary.done < len(kit.cells())
    with Store.open(tmp_path) as store:
        assert store.planned() == kit.cells()
        assert len(store.records()) == summary.done
    assert go(kit, tmp_path, "1/3").resumed == summary.done


def test_missing_shards_are_said_and_can_be_merged_later(kit, tmp_path):
    folders = shards(kit, tmp_path)
    merged = merge(tmp_path / "merged", folders[:2])
    assert merged.exit_status == 1
    assert len(merged.missing) == len(Shard.parse("2/3").cells(kit.cells()))
    assert "missing (the first: " in merged.sentence
    assert merge(tmp_path / "merged", folders[2:]).missing == ()
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_a_shard_can_fail_and_be_run_and_merged_again(kit, tmp_path):
    script = {"utility, none, seed 1": "raise"}
    folders = shards(kit, tmp_path, 2, script)
    merged = merge(tmp_path / "merged", folders)
    assert (merged.failed, merged.skipped, merged.exit_status) == (1, 1, 1)
    for index, folder in enumerate(folders):
        go(kit, folder, f"{index}/2", retry_failed=True)
    assert merge(tmp_path / "merged", folders).failed == 0
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_a_done_record_wins_over_a_failed_one_and_timings_do_not_matter(tmp_path):
    one = filled(tmp_path / "a", [Record(CELLS[0], "failed", "out of memory"), done(1, train_seconds=1.0)])
    two = filled(tmp_path / "b", [done(0), done(1, train_seconds=2.0), Record(CELLS[2], "skipped", "by nature")])
    for folders in ([one, two], [two, one]):
        out = tmp_path / f"out-{folders[0].name}"
        assert merge(out, folders).sentence == "3 cells from 2 folders: 2 done, 1 skipped"
        with Store.open(out) as store:
            assert store.statuses() == {CELLS[0].id: "done", CELLS[1].id: "done", CELLS[2].id: "skipped"}


def test_two_done_records_that_differ_are_named_and_nothing_is_written(tmp_path):
    one, two = filled(tmp_path / "a", [done(0)]), filled(tmp_path / "b", [done(0, 0.5)])
    with pytest.raises(UserError) as error:
        merge(tmp_path / "out", [one, two])
    assert str(error.value) == (
        f"cell {CELLS[0].id} ({describe(CELLS[0])}) has two records: metrics.accuracy is 1.0 in {str(one)!r} "
        f"and 0.5 in {str(two)!r}, expected the same; keep one folder"
    )
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "out", [one])
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"metrics\.accuracy is 0\.5 in .* and 1\.0|is 1\.0 in .* and 0\.5"):
        merge(tmp_path / "out", [two])
    assert contents(tmp_path / "out") == before


def test_recovered_texts_that_differ_are_not_printed(tmp_path):
    one = filled(tmp_path / "a", [done(0)], texts=[TextRow(0, "truth", "secret")])
    two = filled(tmp_path / "b", [done(0)], texts=[TextRow(0, "truth", "other")])
    with pytest.raises(UserError, match="the recovered texts differ between") as error:
        merge(tmp_path / "out", [one, two])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "two"}, "holds study 'one' and .* holds 'two', expected one study"),
        ({"spec": {"name": "one", "leakage": {"targets": 4}}}, r"leakage\.targets is 3 in .* and 4 in"),
        ({"cells": CELLS[:2]}, r"cells\[2\] is .* in .* and nothing in"),
        (
            {"cells": [dataclasses.replace(cell, data={"name": "d", "hash": "x"}) for cell in CELLS]},
            r"cells\[0\]\.data\.hash is nothing in .* and 'x' in",
        ),
    ],
)
def test_different_studies_are_refused_with_the_difference(tmp_path, change, sentence):
    spec = {"name": "one", "leakage": {"targets": 3}}
    one, two = filled(tmp_path / "a", spec=spec), filled(tmp_path / "b", **{"spec": spec, **change})
    with pytest.raises(UserError, match=sentence):
        merge(tmp_path / "out", [one, two])
    assert not (tmp_path / "out").exists()


def test_texts_may_be_shown_only_where_all_folders_allow_it(tmp_path):
    one, two = filled(tmp_path / "a", show_text=True), filled(tmp_path / "b")
    merge(tmp_path / "out", [one, two])
    with Store.open(tmp_path / "out") as store:
        assert not store.study().show_text


def test_texts_of_a_folder_that_does_not_show_them_are_not_shown_by_one_that_does(tmp_path):
    one, two = filled(tmp_path / "a", show_text=True), filled(tmp_path / "b")
    merge(one, [two])
    with Store.open(one) as store:
        assert not store.study().show_text


def test_a_running_driver_in_a_source_is_named(tmp_path):
    one = filled(tmp_path / "a", [done(0)])
    with (
        Store.open(one, create=True),
        pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*, expected"),
    ):
        merge(tmp_path / "out", [one])
    merge(tmp_path / "out", [one])


def test_unreadable_and_newer_stores_and_no_stores(tmp_path):
    good = filled(tmp_path / "good", [done(0)])
    with pytest.raises(UserError, match="holds no records"):
        merge(tmp_path / "out", [good, tmp_path / "nowhere"])
    newer = shutil.copytree(good, tmp_path / "newer")
    with sqlite3.connect(newer / FILE) as other:
        other.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    other.close()
    with pytest.raises(UserError, match="has schema 99, made by a newer dpguard"):
        merge(tmp_path / "out", [good, newer])
    broken = shutil.copytree(good, tmp_path / "broken")
    content = bytearray((broken / FILE).read_bytes())
    content[2000:] = b"\xff" * (len(content) - 2000)
    (broken / FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"nothing was deleted|cannot be read"):
        merge(tmp_path / "out", [good, broken])
    odd = shutil.copytree(good, tmp_path / "odd")
    with sqlite3.connect(odd / FILE) as other:
        other.execute("UPDATE records SET record = '{'")
    other.close()
    with pytest.raises(UserError, match="cannot be read"):
        merge(tmp_path / "out", [good, odd])
    assert not (tmp_path / "out").exists()


def test_a_folder_named_twice(tmp_path):
    one = filled(tmp_path / "a")
    for out, folders in ((one, [one]), (tmp_path / "out", [one, tmp_path / "." / "a"])):
        with pytest.raises(UserError, match="is named twice"):
            merge(out, folders)
