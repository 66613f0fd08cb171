"""kill -9 at random moments, a full disk: nothing stored is lost, nothing runs twice, no process stays."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter

import pytest

from dpguard.errors import UserError
from dpguard.study.cache import Cache
from dpguard.study.store import Store
from tests.study.test_runner import contents, go, session, start, starts, until


def kill_something(driver, choose):
    """SIGKILL for the driver, a worker or the server; what is left of a killed driver ends within 5 seconds."""
    everyone = session(driver.pid)
    workers = [pid for pid in everyone if pid != driver.pid]
    victim = driver.pid if choose.random() < 0.4 or not workers else choose.choice(workers)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    if victim == driver.pid:
        driver.wait(timeout=60)
    return victim == driver.pid


def rounds(kit, tmp_path, moments, seed):
    """Run, kill, run again, ``moments`` times, then to the end; what was done stays done and is done once."""
    choose, folder, log = random.Random(seed), tmp_path / "out", tmp_path / "log"
    done, killed_drivers, kills, driver = {}, 0, 0, None
    context = {"seconds": 0.15, "log": str(log)}
    while kills < moments:
        if driver is None:
            before = sum(starts(log).values())
            driver = start(kit, folder, context)
            until(
                lambda n=before, d=driver: sum(starts(log).values()) > n or d.poll() is not None, "a first cell started"
            )
        time.sleep(choose.uniform(0.05, 1.0))
        if driver.poll() is None:
            kills += 1
            killed_drivers += kill_something(driver, choose)
            time.sleep(0.05)
        if driver.poll() is not None or choose.random() < 0.3:
            if driver.poll() is None:
                driver.kill()
            _out, err = driver.communicate(timeout=60)
            # a worker being born when its driver is killed says so from multiprocessing, before any code of ours
            assert not re.search(r"/dpguard/(study|cli)/\w+\.py", err), err
            until(lambda pid=driver.pid: not session(pid), "every process of the run ended", seconds=5)
            with Store.open(folder) as store:
                now = {r.cell.id: r for r in store.records() if r.status == "done"}
            assert done.items() <= now.items()  # the very records, provenance and all: nothing lost, nothing repeated
            done, driver = now, None
            if len(done) == len(kit.cells()):
                done, folder = {}, tmp_path / f"out-{kills}"
    if driver is not None:
        driver.kill()
        driver.communicate(timeout=60)
        until(lambda pid=driver.pid: not session(pid), "every process of the run ended", seconds=5)
    return folder, killed_drivers


def check(kit, tmp_path, folder):
    before = starts(tmp_path / "log")
    with Store.open(folder) as store:
        done = {cell_id for cell_id, status in store.statuses().items() if status == "done"}
    summary = go(kit, folder, context={"log": str(tmp_path / "log")})
    assert (summary.failed, summary.left, summary.exit_status) == (0, 0, 0)
    again = starts(tmp_path / "log") - before
    assert again == Counter({cell.id: 1 for cell in kit.cells() if cell.id not in done})
    go(kit, tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_killed_at_three_moments_and_run_again(kit, tmp_path):
    folder, _ = rounds(kit, tmp_path, 3, seed=5)
    check(kit, tmp_path, folder)


@pytest.mark.slow
def test_killed_at_twenty_moments_and_run_again(kit, tmp_path):
    folder, killed_drivers = rounds(kit, tmp_path, 20, seed=11)
    assert 3 <= killed_drivers <= 17
    check(kit, tmp_path, folder)


def test_a_server_that_ends_takes_no_cell_with_it(kit, tmp_path):
    """Its workers go on and answer; only the next cell needs another server."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    waiting = {"script": {"guarantee, none": "wait", "guarantee, last-block": "wait"}, "gate": str(gate)}
    driver = start(kit, tmp_path / "out", {**waiting, "log": str(log)})
    until(lambda: len(starts(log)) >= 4, "both waiting cells started")
    workers = {int(row.split()[1]) for row in log.read_text().splitlines()}
    helpers = [pid for pid in session(driver.pid) if pid != driver.pid and pid not in workers]
    for pid in helpers:  # the server, and multiprocessing's tracker of resources
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    gate.touch()
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, (out, err)
    assert set(starts(log).values()) == {1}
    until(lambda: not session(driver.pid), "every process of the run ended", seconds=5)


def test_a_full_disk_stops_the_run_with_a_sentence_and_loses_no_record(kit, tmp_path, monkeypatch):
    put, count = Store.put, 0

    def fills_up(self, record, texts=()):
        nonlocal count
        count += 1
        if count > 5:
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count={pages}")
            record.result["filler"] = os.urandom(200_000).hex()
        put(self, record, texts)

    monkeypatch.setattr(Store, "put", fills_up)
    with pytest.raises(UserError, match=r"disk is full.*nothing was deleted"):
        go(kit, tmp_path / "out")
    monkeypatch.setattr(Store, "put", put)
    summary = go(kit, tmp_path / "out")
    assert (summary.resumed, summary.exit_status) == (5, 0)
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_takes_the_cache_before_it_loses_a_record(kit, tmp_path, monkeypatch):
    Cache(tmp_path).plain({"what": "thing"}, lambda: 1)
    put, failures = Store.put, [1]

    def full_once(self, record, texts=()):
        if failures:
            failures.pop()
            raise UserError("database or disk is full")
        put(self, record, texts)

    monkeypatch.setattr(Store, "put", full_once)
    assert go(kit, tmp_path).exit_status == 0
    assert Cache(tmp_path).entries() == []


@pytest.mark.slow
def test_on_a_disk_of_one_megabyte(kit, tmp_path):
    """A real full disk, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting needs rights that this user has not")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(880_000))
        driver = start(kit, disk / "out", {"script": {"guarantee, none": "big-random"}})
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 1, out
        assert "nothing was deleted" in err
        filler.unlink()
        driver = start(kit, disk / "out", {})
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 0, (out, err)
        go(kit, tmp_path / "whole")
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=False)
