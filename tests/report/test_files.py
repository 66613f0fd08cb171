"""Files of a report: whole or not there, two writers beside each other, nothing that only a log may hold."""

from __future__ import annotations

import contextlib

from dpguard.report import card, files, sources
from dpguard.study.record import Cell, Record


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "card.json"
    files.write(path, "old")
    with contextlib.suppress(ValueError), files.replacing(path) as part:
        part.write_text("half")
        raise ValueError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]
    files.write(path, b"new")
    assert path.read_bytes() == b"new"


def test_two_processes_write_beside_each_other(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    with files.replacing(path) as mine:
        monkeypatch.setattr(files.os, "getpid", lambda: 1)
        with files.replacing(path) as theirs:
            theirs.write_text("theirs")
            mine.write_text("mine")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine"


def test_policies_of_any_script_have_folders_of_their_own():
    names = ["стандарт 1", "строгий 1", "1", "東京", "京都"]
    assert len({card.file_name(name) for name in names}) == len(names)
    assert all(card.file_name(name).isascii() for name in names)


def test_a_page_shows_neither_traceback_nor_output_nor_host():
    secret = "ValueError: 'the patient of ward 3' in /home/ward"
    told = {
        "versions": {"torch": "2.13"}, "seed": 0, "seconds": 1.0, "failure": "raised", "traceback": secret,
        "output": secret, "node": "ward-3.example", "whatever comes later": secret,
    }  # fmt: skip
    record = Record(Cell("leakage", "p", [], {}, {}, {}), "failed", reason="x", provenance=told)
    shown = sources.provenance([record])
    assert ("torch", "2.13") in shown
    assert not any(word in str(shown) for word in ("patient", "ward", "whatever"))
