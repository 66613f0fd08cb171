"""What a run leaves for those who ask: its journal, its lock, provenance, and stores of an earlier format."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, replace

import pytest

from dpguard.cli.watching import _state, print_cell, print_status
from dpguard.errors import UserError
from dpguard.study import provenance
from dpguard.study.journal import FILE as JOURNAL
from dpguard.study.journal import Journal, Running
from dpguard.study.lock import in_use
from dpguard.study.record import Record, canonical
from dpguard.study.runner import run
from dpguard.study.store import FILE, Store
from tests.study.test_runner import go


def test_a_journal_comes_back_and_a_damaged_one_is_none(tmp_path):
    journal = Journal(workers=2, running=(Running("a", "utility, none, seed 0", 5.0),), at=9.0, remaining=3.5)
    journal.write(tmp_path)
    assert Journal.read(tmp_path) == journal
    (tmp_path / JOURNAL).write_text("{half")
    assert Journal.read(tmp_path) is None
    assert Journal.read(tmp_path / "nowhere") is None


def test_how_a_study_stands_is_said():
    journal = Journal(pid=7, host="here", at=0.0)
    assert _state("process 7 on here", journal, 3, 9) == "running, process 7 on here"
    assert _state("", journal, 3, 9).startswith("crashed: process 7 on here ended without a word")
    assert _state("", replace(journal, ended="interrupted"), 3, 9).startswith("stopped with 3 of 9 cells left")
    assert _state("", replace(journal, ended="finished"), 0, 9) == "finished"
    shard = _state("", replace(journal, ended="finished"), 4, 9)
    assert shard == "finished what was its own; 4 of 9 cells are another shard's"
    assert _state("", replace(journal, ended="no room"), 3, 9) == "stopped by an error: no room"
    searching = _state("", replace(journal, ended="searching"), 0, 9)
    assert searching == "stopped before a sweep's next value; run the same command again to go on"


def test_a_finished_run_says_so_and_lets_the_folder_go(kit, tmp_path):
    seen = []
    go(kit, tmp_path, on_event=lambda event: seen.append(in_use(tmp_path)))
    assert "process" in seen[0]
    assert in_use(tmp_path) == ""
    found = Journal.read(tmp_path)
    assert (found.ended, found.running) == ("finished", ())


def test_what_a_killed_run_left_is_forgotten_by_the_next_before_its_first_cell(kit, tmp_path):
    go(kit, tmp_path)
    ghosts = tuple(Running(cell.id, "a ghost", 0.0) for cell in kit.cells())
    Journal(pid=1, running=ghosts, at=1.0, remaining=99.0, best="old").write(tmp_path)  # killed before its last word
    assert go(kit, tmp_path).done == 0
    assert Journal.read(tmp_path).ended == "finished"

    Journal(pid=1, running=ghosts, at=1.0, ended="finished").write(tmp_path)
    seen = []

    def executor():
        seen.append(Journal.read(tmp_path))
        raise KeyboardInterrupt  # as the workers' server starts

    with pytest.raises(KeyboardInterrupt):
        go(kit, tmp_path, text=kit.text.replace("[0.3, 0.6]", "[0.3, 0.6, 0.9]"), executor=executor)
    assert (seen[0].running, seen[0].ended) == ((), "")
    assert _state("", seen[0], 3, 9).startswith("crashed: ")
    assert Journal.read(tmp_path).ended == "interrupted"
    with pytest.raises(UserError):
        go(kit, tmp_path, reuse=[tmp_path / "nowhere"])
    assert "holds no records" in Journal.read(tmp_path).ended


def test_a_cell_that_is_stored_and_still_named_as_running_is_left_once(kit, tmp_path, capsys):
    cells = kit.cells()
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "name: s", {"name": "s"}, cells)
        store.put(Record(cells[0], "done"))
        Journal(running=tuple(Running(c.id, "words", 0.0) for c in cells[:2])).write(tmp_path)
        print_status(tmp_path, as_json=True)
        told = json.loads(capsys.readouterr().out)
        assert (told["left"], len(told["running"])) == (len(cells) - 2, 2)
        Journal(pid=1, running=tuple(Running(c.id, "a ghost", 0.0) for c in cells), remaining=9.0).write(tmp_path)
        print_status(tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["left"], told["running"], told["remaining_seconds"]) == (len(cells) - 1, [], None)


def test_show_prints_json_whatever_fits(kit, tmp_path, capsys):
    cells = kit.cells()

    def shown(*words):
        print_cell(tmp_path, list(words), as_json=True)
        return json.loads(capsys.readouterr().out)

    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "name: s", {"name": "s"}, cells)
        store.put(Record(cells[0], "done"))
    assert [one["id"] for one in shown("guarantee")] == [cell.id for cell in cells if cell.leg == "guarantee"]
    assert shown("guarantee")[0] == {"id": cells[0].id, "status": "done", "cell": "guarantee, none"}
    assert shown("failed") == []
    assert shown(cells[0].id)["status"] == "done"
    assert (shown(cells[1].id)["status"], shown(cells[1].id)["result"]) == ("left", {})


def test_records_say_where_they_come_from_and_not_on_which_machine(kit, tmp_path):
    go(kit, tmp_path)
    with Store.open(tmp_path) as store:
        told = store.records()[5].provenance
    assert {"versions", "git", "started", "seconds", "cpu_seconds", "peak_mb", "seed"} <= set(told)
    assert {"python", "torch", "transformers", "opacus", "dpguard"} <= set(told["versions"])
    assert "host" not in told


def test_without_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision(tmp_path / "s.yaml") is None


def test_a_store_of_format_1_is_read_and_gone_on_with(kit, tmp_path):
    go(kit, tmp_path)
    with Store.open(tmp_path) as store:
        records, planned = store.records(), store.planned()
    other = sqlite3.connect(tmp_path / FILE)
    with other:
        other.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
        for record in records:
            other.execute("UPDATE records SET record = ? WHERE id = ?", (canonical(asdict(record)), record.cell.id))
        for cell in planned:
            other.execute("UPDATE plan SET cell = ? WHERE id = ?", (canonical(asdict(cell)), cell.id))
        other.execute("DELETE FROM records WHERE id = ?", (planned[-1].id,))
    other.close()
    with Store.open(tmp_path) as store:
        assert store.records() == records[:-1]
    assert (go(kit, tmp_path).resumed, go(kit, tmp_path).resumed) == (len(planned) - 1, len(planned))
    with Store.open(tmp_path) as store:
        assert [record.result for record in store.records()] == [record.result for record in records]


def test_a_damaged_record_is_a_sentence(kit, tmp_path):
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "", {}, kit.cells())
        store.put(Record(kit.cells()[0], "done"))
        store._connection.execute("UPDATE records SET record = x'00'")
        with pytest.raises(UserError, match="a stored record cannot be read"):
            store.records()


def test_a_study_file_that_changed_before_its_first_cell_is_told(kit, tmp_path, capfd):
    path = tmp_path / "study.yaml"
    path.write_text(kit.text)
    study = kit.study(path=str(path))
    path.write_text(kit.text.replace("Does it help?", "Does it?"))  # while model and texts are read
    run(study, tmp_path / "out", study.cells(kit.model, kit.data)[:1], execute=kit.execute, context={"script": {}})
    assert capfd.readouterr().err.count("study.yaml has changed since this run was planned") == 1


def test_a_study_file_that_changes_while_it_runs_is_told(kit, tmp_path, capfd):
    path = tmp_path / "study.yaml"
    path.write_text(kit.text)
    study = kit.study(path=str(path))
    cells = study.cells(kit.model, kit.data)[:4]
    changed = kit.text.replace("Does it help?", "Does it?")
    run(
        study, tmp_path / "out", cells, execute=kit.execute, context={"script": {}}, workers=2,
        on_event=lambda event: path.write_text(changed),
    )  # fmt: skip
    assert "study.yaml has changed since this run was planned: the run goes on as planned" in capfd.readouterr().err
