"""Shared work is done once, and a damaged entry is made again."""

from __future__ import annotations

from dpguard.study.cache import FOLDER, Cache


def test_an_entry_is_made_once_and_another_key_is_another_entry(tmp_path) -> None:
    made = []

    def make(value):
        made.append(value)
        return {"value": value}

    cache = Cache(tmp_path)
    assert cache.plain({"a": 1}, lambda: make(1)) == {"value": 1}
    assert Cache(tmp_path).plain({"a": 1}, lambda: make(2)) == {"value": 1}
    assert cache.plain({"a": 2}, lambda: make(3)) == {"value": 3}
    assert made == [1, 3]
    assert not list((tmp_path / FOLDER).glob("*.part"))


def test_a_damaged_entry_is_made_again(tmp_path) -> None:
    Cache(tmp_path).plain({"a": 1}, lambda: 1)
    (entry,) = (tmp_path / FOLDER).glob("*.json")
    entry.write_text("{half")
    assert Cache(tmp_path).plain({"a": 1}, lambda: 2) == 2
    assert Cache(tmp_path).plain({"a": 1}, lambda: 3) == 2
