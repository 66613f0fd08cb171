"""A cell over its time or memory is one failed record with its reason, and its helpers end with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dpguard.study import processes
from dpguard.study.executor import Limits
from dpguard.study.runner import limits_of, run
from dpguard.study.store import Store
from dpguard.study.workers import Workers, warm_up

SLOW = "leakage at start, last-block, seed 1"


def go(kit, folder, text, script, **context):
    study = kit.study(text)
    cells = [
        cell for cell in study.cells(kit.model, kit.data) if cell.leg != "utility" and "needs" not in cell.settings
    ]
    context = {"script": script, **context}
    summary = run(study, folder, cells, execute=kit.execute, context=context, workers=2, quiet=True)
    with Store.open(folder) as store:
        return summary, cells, store.failed()


def until_gone(pid):
    deadline = time.monotonic() + 30
    while processes.is_same(processes.identity(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes.is_same(processes.identity(pid))


def test_a_cell_over_its_time_is_one_failed_record(kit, tmp_path):
    text = kit.text + "limits: {minutes: 0.1}\n"
    summary, cells, failed = go(kit, tmp_path, text, {SLOW: "sleep"})
    assert (summary.failed, summary.done, summary.exit_status) == (1, len(cells) - 1, 1)
    assert failed[0].reason.startswith("ended by its time limit: 0.1 minutes allowed (limits.minutes), 0.1")
    assert failed[0].provenance["failure"] == "time"
    assert failed[0].provenance["seconds"] > 5.9
    assert "about to sleep" in failed[0].provenance["output"]
    # it is an answer: a plain run leaves it, and says how to try it again
    summary, _cells, _failed = go(kit, tmp_path, text, {})
    assert (summary.done, summary.left, summary.exit_status) == (0, 1, 1)
    assert "1 failed there and left as it is; --retry-failed runs the 1 failed again" in summary.sentence


def test_a_cell_over_its_memory_is_one_failed_record_and_its_helpers_end_with_it(kit, tmp_path):
    # far over what a worker holds that was forked from a server with every library in it
    text = kit.text + "limits: {gigabytes: 1.5}\n"
    summary, cells, failed = go(kit, tmp_path, text, {SLOW: "eat"}, pids=str(tmp_path / "pids"))
    assert (summary.failed, summary.done, summary.exit_status) == (1, len(cells) - 1, 1)
    assert failed[0].reason.startswith("ended by its memory limit: 1.5 GB allowed (limits.gigabytes), 1.")
    assert failed[0].provenance["peak_mb"] > 1400
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(until_gone(pid) for pid in pids)


def test_limits_are_no_part_of_a_cell(kit):
    study = kit.study(kit.text + "limits: {minutes: 1, gigabytes: 2}\ncache: {gigabytes: 1}\n")
    assert limits_of(study) == Limits(1, 2)
    assert [c.id for c in study.cells(kit.model, kit.data)] == [c.id for c in kit.cells()]
    assert study.plain() == kit.study().plain()


@pytest.mark.parametrize("section", ["limits: {minutes: 0}", "limits: {hours: 1}", "cache: {gigabytes: -1}"])
def test_a_limit_that_cannot_be_meant_has_its_place(kit, section):
    with pytest.raises(ValueError, match=r"^study\.yaml:10:\d+: "):
        kit.study(kit.text + section + "\n")


def test_each_running_cell_has_a_device_of_its_own(kit, tmp_path):
    warm_up()
    cells = kit.cells()[:14]
    # no weights are kept here, so an attack on trained ones trains
    training = {cell.id for cell in cells if cell.leg == "utility" or cell.settings.get("at") == "end"}
    assert len(training) > 2
    workers = Workers(kit.execute, {"script": {}, "log": str(tmp_path / "log")}, 4, devices=["3", "GPU-b"])
    assert workers.places == 4
    waiting, records = list(cells), []
    wake, ring = os.pipe()
    try:
        while len(records) < len(cells):
            while len(workers._running) < workers.places and (cell := next(filter(workers.takes, waiting), None)):
                waiting.remove(cell)
                workers.start(cell)
            own = [worker.setting.device for worker in workers._running.values() if worker.setting.device]
            assert len(set(own)) == len(own) == sum(cell_id in training for cell_id in workers._running)
            records += [record for record, _ in workers.wait(wake)]
    finally:
        workers.close()
        os.close(wake)
        os.close(ring)
    on = {record.cell.id: (record.result["device"], record.result["told"]) for record in records}
    assert {on[cell_id] for cell_id in training} == {("3", "cuda"), ("GPU-b", "cuda")}
    assert {on[cell.id] for cell in cells if cell.id not in training} == {("", None)}
    assert sorted(workers._free) == ["3", "GPU-b"]


def test_without_devices_the_environment_is_left_alone(kit, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run(kit.study(), tmp_path, kit.cells()[:1], execute=kit.execute, context={"script": {}}, quiet=True)
    with Store.open(tmp_path) as store:
        assert store.records()[0].result["device"] is None


def test_a_killed_cell_can_be_started_again(kit, tmp_path):
    warm_up()
    cell, gate = kit.cells()[0], tmp_path / "gate"
    script = {"script": {"guarantee, none": "wait"}, "gate": str(gate), "log": str(tmp_path / "log")}
    workers = Workers(kit.execute, script, 1)
    wake, ring = os.pipe()
    try:
        workers.start(cell)
        while not (tmp_path / "log").exists():
            time.sleep(0.02)
        pid = int((tmp_path / "log").read_text().split()[1])
        workers.kill(cell.id)
        assert until_gone(pid)
        assert workers.wait(wake, 0.1) == []
        gate.touch()
        workers.start(cell)
        answers = workers.wait(wake)
        assert [record.status for record, _ in answers] == ["done"]
    finally:
        workers.close()
        os.close(wake)
        os.close(ring)


def test_memory_counts_the_children(tmp_path):
    assert processes.memory(os.getpid()) > 10_000_000
    assert processes.memory(2**22 + 5) == 0
    assert not processes.is_same(processes.Identity(os.getpid(), "0"))
    assert Path(f"/proc/{os.getpid()}").is_dir()
