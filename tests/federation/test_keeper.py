"""A server that was started for one run ends with it, also when its owner is killed with SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpguard.federation import keeper
from dpguard.study import processes
from tests import tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by /proc")

SERVER = """
import os, subprocess, sys, time
# a leader of a session of its own, and below it what no longer shows its mark, as Ray's agents do
below = "import subprocess as s, time; print('up', s.Popen(['sleep', '600'], env={}).pid, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", below], start_new_session=True)
time.sleep(600)
"""
OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from dpguard.federation import keeper
from dpguard.study import forked

home = Path(sys.argv[1])
environment = {**os.environ, keeper.MARK: sys.argv[2]}
keeper.start([sys.executable, "-c", sys.argv[3]], environment=environment, log=home / "log", folders=[home / "texts"])
subprocess.Popen(["sleep", "600"], env=environment)
print("started", flush=True)
if "its driver ends" in sys.argv:
    sys.stdin.read()
    forked.parent_process, forked.wait = lambda: type("Driver", (), {"sentinel": 0}), lambda gone: None
    forked._end_with_driver()
time.sleep(600)
"""
KILLS = {
    "killed": lambda owner: owner.send_signal(signal.SIGKILL),
    "over a limit": lambda owner: processes.end(processes.identity(owner.pid)),
    "its driver ends": lambda owner: owner.stdin.close(),
}


def until(true, seconds=60.0):
    """Wait for something; how long is no part of the test."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


def unmarked_is_gone(home):
    pid = (home / "log").read_text().split()[1]
    return until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text())


def start(home, mark):
    environment = {**os.environ, keeper.MARK: mark}
    link = keeper.start(
        [sys.executable, "-c", SERVER], environment=environment, log=home / "log", folders=[home / "texts"]
    )
    assert until(lambda: "up" in (home / "log").read_text())
    assert len(keeper.marked(mark)) == 3, "keeper, server, and the server's child in a session of its own"
    return link


@pytest.fixture
def home(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path


def test_an_orderly_stop_leaves_no_process_and_the_owners_folders(home):
    link = start(home, "keeper-test-1")
    keeper.stop(link, "keeper-test-1")
    assert keeper.marked("keeper-test-1") == []
    assert unmarked_is_gone(home)
    assert (home / "texts").is_dir()


@pytest.mark.parametrize("how", KILLS)
def test_an_owner_that_ends_by_force_leaves_no_process_and_no_texts(home, how):
    mark = f"keeper-test-2-{how}"
    words = [sys.executable, "-c", OWNER, str(home), mark, SERVER, how]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, env=environment, start_new_session=True, **pipes) as owner:
        assert owner.stdout.readline() == "started\n"
        assert until(lambda: "up" in (home / "log").read_text())
        KILLS[how](owner)
        owner.wait(60)
    assert until(lambda: not keeper.marked(mark))
    assert until(lambda: not (home / "texts").exists())
    assert unmarked_is_gone(home)


def test_a_keeper_that_is_killed_is_swept_up_by_its_owner(home):
    link = start(home, "keeper-test-3")
    link.kill()
    keeper.stop(link, "keeper-test-3")
    assert keeper.marked("keeper-test-3") == []
    assert unmarked_is_gone(home)


def test_a_server_that_ends_by_itself_ends_the_keeper_with_its_status(home):
    environment = {**os.environ, keeper.MARK: "keeper-test-4"}
    link = keeper.start(["false"], environment=environment, log=home / "log")
    assert link.wait(60) == 1
    keeper.stop(link, "keeper-test-4")


STUDY = """\
import sys
from dpguard.federation import flower
from dpguard.federation.settings import Settings
from dpguard.federation.split import split
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.texts import Example
from dpguard.policy.table import Policy

model = models.load(sys.argv[1], labels=2, seed=0)
texts = [Example("the cat sat", k % 2) for k in range(8)]
settings = Settings(clients=2, per_round=2, rounds=1000, batch_size=2)
plan = Policy([{"layers": "all", "clip": 1.0}]).plan(slots(model.module))
flower.run(
    model, texts, split(texts, (), settings)[0], plan, settings, labels=2, seed=0,
    say=lambda line: print(line, flush=True),
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "over a limit"])
def test_a_worker_killed_in_the_middle_of_flowers_rounds_leaves_nothing_running(tmp_path, how):
    pytest.importorskip("ray", reason="the [flower] extra is not installed")
    tiny.module("bert", width=16, blocks=2).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", STUDY, str(tmp_path / "model")]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as worker:
        try:
            said = ""
            for line in worker.stdout:  # until the app runs: every process is there
                said += line
                if "Starting" in line:
                    break
            marks = {mark for mark in _marks() if mark.startswith(f"{worker.pid}-")}
        finally:
            KILLS[how](worker)
    assert len(marks) == 1, said
    assert until(lambda: not keeper.marked(*marks))
    assert until(lambda: not list((tmp_path / "tmp").glob("dpg*"))), "texts lay there"


def _marks():
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {v.decode().partition("=")[2] for v in variables if v.startswith(f"{keeper.MARK}=".encode())}
    return found
