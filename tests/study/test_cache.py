"""Shared work is done once, and a damaged entry is made again."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch

from dpguard.study.cache import FOLDER, TENSORS, Cache
from dpguard.study.tensors import keep, shared


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


def weights(value, size=1000):
    return {"w": torch.full((size,), float(value))}


def test_tensors_are_kept_and_damaged_ones_made_again(tmp_path):
    cache = Cache(tmp_path)
    key = {"what": "weights", "cell": "abc"}
    assert torch.equal(shared(cache, key, lambda: weights(1))["w"], weights(1)["w"])
    assert torch.equal(shared(cache, key, lambda: weights(2))["w"], weights(1)["w"])
    (entry,) = cache.entries()
    assert (entry.what, entry.path.suffix) == ("weights", ".safetensors")
    for damage in (entry.path.read_bytes()[:50], b"", b"\xff" * 100):
        entry.path.write_bytes(damage)
        assert torch.equal(shared(cache, key, lambda: weights(3))["w"], weights(3)["w"])


def test_what_was_just_made_replaces_what_a_failed_run_left(tmp_path, monkeypatch):
    """Or attacks would read the weights of one training and utility those of another."""
    cache, key = Cache(tmp_path), {"what": "weights", "cell": "abc"}
    keep(cache, key, weights(1))
    keep(cache, key, weights(2))
    assert torch.equal(shared(cache, key, lambda: pytest.fail("it is there"))["w"], weights(2)["w"])

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr("dpguard.study.tensors.save_file", full)
    keep(cache, key, weights(3))
    assert not cache.has(key, TENSORS)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = Cache(tmp_path, gigabytes=13e-6)  # three entries of 4 kB and a bit
    for number in range(3):
        shared(cache, {"what": f"w{number}"}, lambda number=number: weights(number))
        os.utime(cache.entries()[-1].path, (number, number))
    shared(cache, {"what": "w0"}, lambda: pytest.fail("it is there"))  # used again
    shared(cache, {"what": "w3"}, lambda: weights(3))
    assert {entry.what for entry in cache.entries()} == {"w0", "w2", "w3"}


def test_an_entry_too_large_for_the_room_is_made_and_not_kept(tmp_path):
    for room in (5e-6, 0):
        cache = Cache(tmp_path, gigabytes=room)
        assert shared(cache, {"what": "w"}, lambda: weights(7))["w"][0] == 7
        assert cache.entries() == []


def test_without_room_on_the_disk_the_work_is_not_lost(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpguard.study.tensors.save_file", full)
    assert shared(Cache(tmp_path), {"what": "w"}, lambda: weights(7))["w"][0] == 7
    (tmp_path / "blocked").write_text("")
    assert Cache(tmp_path / "blocked").plain({"a": 1}, lambda: 5) == 5  # no folder can be made there
    assert Cache(tmp_path).entries() == []


def test_a_mistake_in_making_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Cache(tmp_path).plain({"a": 1}, lambda: 1 / 0)


def _make_slowly(folder, out):
    def make():
        with open(out, "a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return os.getpid()

    Cache(folder).plain({"what": "slow"}, make)


def _hang(folder, out):
    def make():
        open(out, "a", encoding="utf-8").close()
        time.sleep(600)

    Cache(folder).plain({"what": "slow"}, make)


def test_processes_that_need_the_same_make_it_once_and_a_killed_one_holds_up_nobody(tmp_path):
    fork = multiprocessing.get_context("fork")
    hanging = fork.Process(target=_hang, args=(tmp_path, tmp_path / "hangs"))
    hanging.start()
    while not (tmp_path / "hangs").exists():
        time.sleep(0.02)
    makers = [fork.Process(target=_make_slowly, args=(tmp_path, tmp_path / "log")) for _ in range(3)]
    for maker in makers:
        maker.start()
    hanging.kill()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    cache = Cache(tmp_path)
    cache.plain({"a": 1}, lambda: 1)
    (cache.folder / "weights-x.safetensors.77.part").write_text("half")
    assert len(cache.entries()) == 1
    cache.tidy()
    assert not list(cache.folder.glob("*.part"))
    assert cache.clear() > 0
    assert cache.entries() == []
