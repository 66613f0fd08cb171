from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS, describe
from dpguard.study.progress import Event, line
from dpguard.study.record import Record
from dpguard.study.runner import run
from dpguard.study.store import Store
from dpguard.study.summary import Summary
from dpguard.study.todo import Todo

DRIVER = """
import json, sys
from dpguard.documents import Document
from dpguard.study.runner import run
from dpguard.study.spec import Study

folder, context, workers, model, data, execute, text = json.loads(sys.argv[1])
study = Study.read(Document.parse(text, "study.yaml"))
summary = run(study, folder, study.cells(model, data), execute=execute, context=context, workers=workers)
print(summary.sentence)
sys.exit(summary.exit_status)
"""


def start(kit, folder, context, text=None, workers=2, script=None):
    """A driver in a process group of its own, as a shell starts it."""
    arguments = json.dumps([str(folder), context, workers, kit.model, kit.data, kit.execute, text or kit.text])
    source = ["-c", DRIVER] if script is None else [str(script)]
    return subprocess.Popen(
        [sys.executable, *source, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def go(kit, folder, script=None, text=None, **options):
    study = kit.study(text or kit.text)
    cells = study.cells(kit.model, kit.data)
    context = {"script": script or {}, **options.pop("context", {})}
    options = {"workers": 2, "quiet": True, **options}
    return run(study, folder, cells, execute=kit.execute, context=context, **options)


def contents(folder):
    """Everything that must not depend on how the run went."""
    with Store.open(folder) as store:
        records = [(r.cell, r.status, r.reason, r.result) for r in store.records()]
        return records, [store.texts(record[0].id) for record in records]


def starts(log):
    return Counter(row.split()[0] for row in log.read_text().splitlines()) if log.exists() else Counter()


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def session(leader):
    """Every living process of a session: the driver, its worker server, the workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(entry.name):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def test_every_cell_runs_once_and_is_stored(kit, tmp_path):
    log = tmp_path / "log"
    summary = go(kit, tmp_path / "out", context={"log": str(log)})
    cells = kit.cells()
    assert summary == Summary(len(cells), 0, len(cells), 0, 0, 0, False)
    assert summary.exit_status == 0
    assert starts(log) == Counter(cell.id for cell in cells)
    with Store.open(tmp_path / "out") as store:
        assert [record.cell for record in store.records()] == cells
        assert store.study().spec == kit.study().plain()
        assert store.study().yaml == kit.text
        assert store.texts(cells[5].id)[0].text == f"text of {cells[5].id}"
        provenance = store.records()[0].provenance
    assert {"seconds", "peak_mb", "started"} <= set(provenance)


def test_a_finished_study_runs_nothing_again(kit, tmp_path):
    log = tmp_path / "log"
    go(kit, tmp_path / "out", context={"log": str(log)})
    summary = go(kit, tmp_path / "out", context={"log": str(log)})
    assert (summary.resumed, summary.done, summary.exit_status) == (len(kit.cells()), 0, 0)
    assert set(starts(log).values()) == {1}


def test_the_number_of_workers_changes_nothing(kit, tmp_path):
    go(kit, tmp_path / "one", workers=1)
    go(kit, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_an_exception_is_a_failed_record_and_the_study_goes_on(kit, tmp_path):
    summary = go(kit, tmp_path, {"leakage at start, none, seed 0": "raise"})
    assert (summary.failed, summary.done, summary.exit_status) == (1, len(kit.cells()) - 1, 1)
    assert summary.failures == (("leakage at start, none, seed 0", "ValueError: a deliberate failure"),)
    assert "--retry-failed runs the 1 failed again" in summary.sentence
    with Store.open(tmp_path) as store:
        [record] = [r for r in store.records() if r.status == "failed"]
    assert record.reason == "ValueError: a deliberate failure"
    assert "in execute" in record.provenance["traceback"]


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("kill", "worker ended with signal 9 (SIGKILL)"),
        ("exit", "worker ended with exit status 3"),
        ("nan", "ValueError: Out of range float values are not JSON compliant"),
    ],
)
def test_a_worker_that_ends_badly_is_a_failed_record(kit, tmp_path, deed, reason):
    summary = go(kit, tmp_path, {"leakage at start, last-block, seed 1": deed})
    assert (summary.failed, summary.done) == (1, len(kit.cells()) - 1)
    assert summary.failures[0][1].startswith(reason)
    if deed == "kill":
        with Store.open(tmp_path) as store:
            [record] = [r for r in store.records() if r.status == "failed"]
        assert "last words" in record.provenance["output"]


def test_an_answer_larger_than_a_pipe_arrives(kit, tmp_path):
    assert go(kit, tmp_path, {"guarantee, none": "big"}).exit_status == 0
    with Store.open(tmp_path) as store:
        assert len(store.records()[0].result["noise"]) == 3_000_000


@pytest.mark.parametrize("name", ["nowhere:execute", "tests/nowhere.py:execute", "json:nothing"])
def test_an_execute_that_is_not_there_fails_every_cell_with_the_reason(kit, tmp_path, name):
    cells = [cell for cell in kit.cells() if cell.leg == "guarantee"]
    summary = run(kit.study(), tmp_path, cells, execute=name, quiet=True, workers=2)
    assert summary.failed == len(cells)


def test_what_needs_a_failed_cell_is_skipped_and_comes_back_with_it(kit, tmp_path):
    training = "utility, none, seed 0"
    attack = "leakage at end, none, seed 0"
    summary = go(kit, tmp_path, {training: "raise"})
    assert (summary.failed, summary.skipped) == (1, 1)
    with Store.open(tmp_path) as store:
        [skipped] = [r for r in store.records() if r.status == "skipped"]
    assert describe(skipped.cell) == attack
    assert skipped.reason == (f"it attacks the weights of {training}, which failed: ValueError: a deliberate failure")
    summary = go(kit, tmp_path)
    assert (summary.done, summary.left, summary.resumed, summary.exit_status) == (0, 1, len(kit.cells()) - 1, 1)
    summary = go(kit, tmp_path, retry_failed=True)
    assert (summary.done, summary.resumed, summary.exit_status) == (2, len(kit.cells()) - 2, 0)
    with Store.open(tmp_path) as store:
        assert {r.status for r in store.records()} == {"done"}


def test_what_waited_for_a_failed_cell_runs_although_the_retry_was_stopped_in_between(kit, tmp_path):
    go(kit, tmp_path, {"utility, none, seed 0": "raise"})
    with Store.open(tmp_path, create=True) as store:
        [failed] = store.failed()
        store.put(Record(failed.cell, "done", result={"loss": 1.0}), [])  # the retry got as far as this
        todo = Todo.of(kit.cells(), store)
        assert [describe(cell) for cell in todo.cells] == ["leakage at end, none, seed 0"]
    assert (go(kit, tmp_path).done, go(kit, tmp_path).done) == (1, 0)


def test_what_needs_a_skipped_cell_is_skipped_for_good(kit, tmp_path):
    script = {"utility, none, seed 1": "skip"}
    summary = go(kit, tmp_path, script)
    assert (summary.skipped, summary.exit_status) == (2, 0)
    with Store.open(tmp_path) as store:
        reasons = [r.reason for r in store.records() if r.status == "skipped"]
    assert reasons == [
        "needs the federation",
        "it attacks the weights of utility, none, seed 1, which was skipped: needs the federation",
    ]
    assert go(kit, tmp_path, script).resumed == len(kit.cells())


def test_needed_cells_run_first(kit, tmp_path):
    log = tmp_path / "log"
    go(kit, tmp_path / "out", workers=4, context={"log": str(log)})
    order = [row.split()[0] for row in log.read_text().splitlines()]
    for cell in kit.cells():
        if NEEDS in cell.settings:
            assert order.index(cell.settings[NEEDS]) < order.index(cell.id)


def test_a_plan_that_cannot_be_run_is_a_bug_that_is_told(kit, tmp_path):
    cells = kit.cells()
    with pytest.raises(ValueError, match="is planned twice"):
        run(kit.study(), tmp_path, [cells[0], cells[0]], execute=kit.execute)
    with pytest.raises(ValueError, match="comes before the one that it needs"):
        run(kit.study(), tmp_path, cells[::-1], execute=kit.execute)


def test_no_workers(kit, tmp_path):
    with pytest.raises(UserError, match="workers is 0, expected a whole number above 0"):
        go(kit, tmp_path, workers=0)


def test_a_changed_study_adds_its_cells_and_leaves_the_old_aside(kit, tmp_path):
    log = tmp_path / "log"
    go(kit, tmp_path / "out", context={"log": str(log)})
    text = kit.text.replace("[0.3, 0.6]", "[0.3, 0.9]")
    summary = go(kit, tmp_path / "out", text=text, context={"log": str(log)})
    assert (summary.done, summary.ignored, summary.resumed) == (8, 8, 24)
    assert summary.sentence.endswith(
        "; 8 stored that the study no longer plans are left aside (leakage, dp-sgd noise=0.6 (4), "
        "utility, dp-sgd noise=0.6 (3), guarantee, dp-sgd noise=0.6 (1))"
    )
    assert set(starts(log).values()) == {1}
    summary = go(kit, tmp_path / "out")
    assert (summary.done, summary.ignored) == (0, 8)


def test_another_study_is_refused(kit, tmp_path):
    go(kit, tmp_path)
    with pytest.raises(UserError, match="holds the records of study 'which-layers', expected an empty folder"):
        go(kit, tmp_path, text=kit.text.replace("which-layers", "another"))


def test_events_tell_every_start_and_finish(kit, tmp_path):
    events = []
    go(kit, tmp_path, {"guarantee, none": "raise"}, on_event=events.append)
    total = len(kit.cells())
    finished = [event for event in events if event.kind == "finished"]
    assert [event.finished for event in finished] == list(range(1, total + 1))
    assert len(events) == 2 * total
    assert all(event.total == total and len(event.running) <= 2 for event in events)


def test_the_line_of_a_finished_cell(kit):
    cell = kit.cells()[4]
    record = Record(cell, "failed", "two\nlines", provenance={"seconds": 1.25})
    event = Event("finished", cell, record, 3, 12)
    assert line(event) == "[ 3/12] failed  utility, none, seed 0 (1.2 s): two lines"


def test_without_a_terminal_every_finished_cell_is_a_line(kit, tmp_path):
    driver = start(kit, tmp_path, {"script": {"guarantee, none": "raise"}})
    out, err = driver.communicate(timeout=120)
    total = len(kit.cells())
    lines = err.splitlines()
    assert driver.returncode == 1
    assert len(lines) == total
    assert all(row.startswith("[") and f"/{total}]" in row for row in lines)
    assert sum("ValueError: a deliberate failure" in row for row in lines) == 1
    assert out.startswith(f"{total} cells: {total - 1} done, 1 failed")


def test_a_script_without_a_guard_runs_once(kit, tmp_path):
    script = tmp_path / "my_study.py"
    script.write_text("print('once', flush=True)\n" + DRIVER)
    driver = start(kit, tmp_path / "out", {}, script=script)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert out.count("once") == 1


def test_killing_the_driver_loses_nothing_and_leaves_no_orphan(kit, tmp_path):
    log = tmp_path / "log"
    context = {"log": str(log), "seconds": 0.1}
    driver = start(kit, tmp_path / "out", context)
    until(lambda: len(starts(log)) >= 6, "six cells started")
    driver.kill()
    driver.communicate(timeout=60)
    until(lambda: not session(driver.pid), "every process of the run ended")
    with Store.open(tmp_path / "out") as store:
        stored = store.done_ids()
    assert 0 < len(stored) < len(kit.cells())
    before = starts(log)
    summary = go(kit, tmp_path / "out", context={"log": str(log)})
    assert (summary.resumed, summary.exit_status) == (len(stored), 0)
    again = starts(log) - before
    assert set(again) == {cell.id for cell in kit.cells()} - stored
    assert set(again.values()) == {1}
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killing_the_worker_server_fails_its_cells_only(kit, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    waiting = {"script": {"guarantee, none": "wait"}, "gate": str(gate), "log": str(log), "seconds": 0.05}
    driver = start(kit, tmp_path / "out", waiting)
    until(lambda: len(starts(log)) >= 4, "four cells started")
    server = next(
        pid
        for pid in session(driver.pid)
        if pid != driver.pid
        and "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
        and int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == driver.pid
    )
    os.kill(server, signal.SIGKILL)
    gate.touch()
    out, err = driver.communicate(timeout=120)
    assert "cells:" in out, err
    summary = go(kit, tmp_path / "out")
    assert summary.exit_status == 0
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_driver_is_refused_and_names_the_first(kit, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    waiting = {"script": {"guarantee, none": "wait"}, "gate": str(gate), "log": str(log)}
    driver = start(kit, tmp_path / "out", waiting)
    until(lambda: starts(log), "a cell started")
    with pytest.raises(UserError, match=rf"is in use by process {driver.pid} on .* since 20.*, expected a folder"):
        go(kit, tmp_path / "out")
    gate.touch()
    driver.communicate(timeout=120)
    assert driver.returncode == 0
    assert go(kit, tmp_path / "out").resumed == len(kit.cells())


def interrupted(kit, tmp_path, times, gate_after):
    """A driver with one cell that waits at a gate, interrupted; the gate opens when it must."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    waiting = {"script": {"guarantee, last-block": "wait"}, "gate": str(gate), "log": str(log)}
    driver = start(kit, tmp_path / "out", waiting, workers=1)
    until(lambda: len(starts(log)) == 4, "the fourth cell started")
    for _ in range(times):
        os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C does: to every process of the group
        time.sleep(0.3)
    if gate_after:
        gate.touch()
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    until(lambda: not session(driver.pid), "every process of the run ended")
    return out, err, starts(log)


def test_ctrl_c_lets_running_cells_finish_and_starts_no_other(kit, tmp_path):
    out, err, started = interrupted(kit, tmp_path, times=1, gate_after=True)
    assert out == "stopped: 4 of 32 cells are finished; run the same command again to go on from there\n"
    assert "finishing 1 running; Ctrl-C again ends them" in err
    assert len(started) == 4
    summary = go(kit, tmp_path / "out")
    assert (summary.resumed, summary.done, summary.exit_status) == (4, 28, 0)


def test_ctrl_c_twice_ends_running_cells_and_keeps_what_is_stored(kit, tmp_path):
    out, _err, _started = interrupted(kit, tmp_path, times=2, gate_after=False)
    assert out.startswith("stopped: 3 of 32 cells are finished; run the same command again")
    summary = go(kit, tmp_path / "out")
    assert (summary.resumed, summary.done) == (3, 29)


def test_a_handler_of_ctrl_c_is_given_back(kit, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    go(kit, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(kit, tmp_path):
    choose = random.Random(3)
    finished = set()
    for _ in range(10):
        driver = start(kit, tmp_path / "out", {"seconds": 0.2})
        time.sleep(choose.uniform(0.3, 1.5))
        victims = session(driver.pid)
        for victim in [driver.pid] if choose.random() < 0.5 or not victims else [choose.choice(victims), driver.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            time.sleep(choose.uniform(0.0, 0.5))
        _out, err = driver.communicate(timeout=60)
        assert "Traceback" not in err
        until(lambda pid=driver.pid: not session(pid), "every process of the run ended")
        if (tmp_path / "out" / "records.sqlite").exists():
            with Store.open(tmp_path / "out") as store:
                assert finished <= store.done_ids()
                finished = store.done_ids()
    go(kit, tmp_path / "out")
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
