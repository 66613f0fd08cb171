"""Answers of one study serve another whose cells are the same, and only those."""

from __future__ import annotations

import os

import pytest

from dpguard.errors import UserError
from dpguard.study.cache import TENSORS, Cache, weights_key
from dpguard.study.reuse import known, take
from dpguard.study.store import Store
from dpguard.study.todo import Todo
from tests.study.test_runner import go, starts

OTHER = """\
name: another
question: Is it the same under another name?
model: demo
data: demo
policies:
  noisy: {sweep: {noise: [0.6, 0.9]}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
leakage: {targets: 3, at: [start, end], seeds: [0, 1]}
utility: {epochs: 2, batch_size: 50, seeds: [0, 1]}
"""


def ids(kit, text):
    return {cell.id for cell in kit.cells(text)}


def test_only_what_no_other_study_answered_runs(kit, tmp_path):
    assert go(kit, tmp_path / "first").done == len(kit.cells())
    shared = ids(kit, kit.text) & ids(kit, OTHER)
    log = tmp_path / "log"
    summary = go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "first"], context={"log": str(log)})
    assert 0 < len(shared) < len(ids(kit, OTHER))
    assert set(starts(log)) == ids(kit, OTHER) - shared
    assert (summary.taken, summary.done, summary.resumed) == (len(shared), len(ids(kit, OTHER)) - len(shared), 0)
    assert f"{len(shared)} taken from another folder" in summary.sentence
    with Store.open(tmp_path / "first") as one, Store.open(tmp_path / "second") as two:
        for cell_id in shared:
            here, there = two.record(cell_id), one.record(cell_id)
            assert (here.result, here.provenance) == (there.result, there.provenance)
            assert two.texts(cell_id) == one.texts(cell_id) != []
        assert {record.cell.policy for record in two.records()} == {"none", "noisy noise=0.6", "noisy noise=0.9"}

    again = go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "first"])
    assert (again.taken, again.done, again.resumed) == (0, 0, len(ids(kit, OTHER)))


def test_a_folder_that_fits_nothing_is_told(kit, tmp_path):
    other = OTHER.replace("epochs: 2", "epochs: 3").replace("targets: 3", "targets: 4")
    go(kit, tmp_path / "first", text=other)
    assert not ids(kit, kit.text) & ids(kit, other)
    summary = go(kit, tmp_path / "second", reuse=[tmp_path / "first"])
    assert summary.taken == 0
    assert f"0 taken from {tmp_path / 'first'}" in summary.sentence
    assert "taken" not in go(kit, tmp_path / "third").sentence


def test_skipped_and_failed_cells_are_not_taken(kit, tmp_path):
    script = {"utility, dp-sgd noise=0.6, seed 0": "raise", "leakage at start, none, seed 0": "skip"}
    go(kit, tmp_path / "first", script=script)
    with Store.open(tmp_path / "first") as store:
        done = {cell_id for cell_id, status in store.statuses().items() if status == "done"}
    shared = ids(kit, kit.text) & ids(kit, OTHER)
    assert shared - done
    summary = go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "first"])
    assert summary.taken == len(shared & done)
    assert (summary.failed, summary.skipped) == (0, 0)


def test_the_first_folder_wins_and_a_fresh_answer_stays(kit, tmp_path):
    for name in ("a", "b"):
        go(kit, tmp_path / name)
    with Store.open(tmp_path / "out", create=True) as store:
        study = kit.study()
        cells = kit.cells()
        store.set_study(study.name, study.text, study.plain(), cells)
        assert known([tmp_path / "a", tmp_path / "b"]) == {cell.id for cell in cells}
        assert take(store, cells[:3], [tmp_path / "a", tmp_path / "b"], show_text=False) == {c.id for c in cells[:3]}
        assert take(store, cells[:3], [tmp_path / "b"], show_text=False) == frozenset()
        with Store.open(tmp_path / "a") as first:
            assert store.record(cells[0].id).provenance == first.record(cells[0].id).provenance


def test_hidden_texts_are_not_shown_by_way_of_another_study(kit, tmp_path):
    go(kit, tmp_path / "first")
    with pytest.raises(UserError, match="keeps its texts hidden, expected a run without it"):
        go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "first"], show_text=True)
    with Store.open(tmp_path / "second") as store:
        assert store.statuses() == {}
    go(kit, tmp_path / "shown", show_text=True)
    assert go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "shown"], show_text=True).taken > 0


def test_a_folder_without_records_is_one_sentence(kit, tmp_path):
    with pytest.raises(UserError, match="nowhere' holds no records"):
        go(kit, tmp_path / "out", reuse=[tmp_path / "nowhere"])


@pytest.mark.parametrize("retry_failed", [False, True])
def test_what_is_ahead_is_what_then_runs(kit, tmp_path, retry_failed):
    script = {"utility, dp-sgd noise=0.6, seed 0": "raise", "utility, dp-sgd noise=0.3, seed 0": "raise"}
    go(kit, tmp_path / "first", text=OTHER, script=script)
    assert Todo.ahead(kit.cells(), tmp_path / "nowhere").cells == tuple(kit.cells())
    go(kit, tmp_path / "out", script={**script, "guarantee, last-block": "skip"})
    with Store.open(tmp_path / "out") as store:
        failed = [record.cell for record in store.failed()]
    assert [cell.policy for cell in failed] == ["dp-sgd noise=0.3", "dp-sgd noise=0.6"]
    text = kit.text.replace("noise: [0.3, 0.6]", "noise: [0.3, 0.6, 0.9]")
    # a fit that the other study has by now: the failed training is taken over, what waited for it runs
    go(kit, tmp_path / "first", text=OTHER, retry_failed=True)
    reuse = [tmp_path / "first"]
    cells, known_ids = kit.cells(text), known(reuse)
    todo = Todo.ahead(cells, tmp_path / "out", retry_failed=retry_failed, known=known_ids)
    log = tmp_path / "log"
    summary = go(kit, tmp_path / "out", text=text, reuse=reuse, retry_failed=retry_failed, context={"log": str(log)})
    assert set(starts(log)) == {cell.id for cell in todo.cells}
    assert summary.left == len(todo.left) == (0 if retry_failed else 1)
    assert any(cell.leg == "leakage" and cell.policy == "dp-sgd noise=0.6" for cell in todo.cells)


def test_weights_come_along_so_that_no_cell_trains_them_again(kit, tmp_path):
    go(kit, tmp_path / "first")
    trained = [cell for cell in kit.cells(OTHER) if cell.leg == "utility" and cell.id in ids(kit, kit.text)]
    assert len(trained) > 1

    def write(path, made):
        path.write_bytes(made)

    def kept(folder, cell, made=lambda: b"none"):
        return Cache(folder).entry(weights_key(cell.id), TENSORS, lambda path: path.read_bytes(), made, write)

    for cell in trained:
        kept(tmp_path / "first", cell, made=lambda cell=cell: cell.id.encode())
    own = trained[0]
    kept(tmp_path / "second", own, made=lambda: b"its own")
    *needed, last = [cell.id for cell in trained]
    go(kit, tmp_path / "second", text=OTHER, reuse=[tmp_path / "first"], context={"keep_weights": needed})
    assert kept(tmp_path / "second", own) == b"its own"
    assert [kept(tmp_path / "second", cell) for cell in trained[1:-1]] == [cell.id.encode() for cell in trained[1:-1]]
    assert not Cache(tmp_path / "second").has(weights_key(last), TENSORS)  # no attack wants them

    for name, room in (("none", 0), ("one", 30e-9), ("half", 50e-9)):  # of entries of 20 bytes, each at most half
        context = {"cache_gigabytes": room, "keep_weights": [cell.id for cell in trained]}
        go(kit, tmp_path / name, text=OTHER, reuse=[tmp_path / "first"], context=context)
        held = sum(Cache(tmp_path / name).has(weights_key(cell.id), TENSORS) for cell in trained)
        assert held == {"none": 0, "one": 0, "half": 2}[name]


def test_weights_stay_as_private_and_as_old_as_they_were(tmp_path):
    one, two = Cache(tmp_path / "one"), Cache(tmp_path / "two")
    key = weights_key("a")
    one.entry(key, TENSORS, lambda path: path.read_bytes(), lambda: b"x", lambda path, made: path.write_bytes(made))
    [entry] = one.entries()
    entry.path.chmod(0o600)
    os.utime(entry.path, (1e9, 1e9))
    two.adopt(one, key, TENSORS)
    [copy] = two.entries()
    assert (copy.path.stat().st_mode & 0o777, copy.used) == (0o600, 1e9)
