"""Two Ray nodes on loopback: the records of a local run, also when one node is killed; tokens stay where they are."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpguard.errors import UserError
from dpguard.study.ray_cells import absolute, exposed, reach
from dpguard.study.record import untimed
from dpguard.study.store import Store
from tests.cli.conftest import write_study as study
from tests.study.conftest import DATA, EXECUTE, MODEL, TEXT

TOKEN = "sentinel-4f1d2c3b5a69788796a5b4c3d2e1f00f"
HAS_RAY = importlib.util.find_spec("ray") is not None
ray_only = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed ([ray] extra)")

DRIVER = """
import sys
print("main is imported", flush=True)
from dpguard.documents import Document
from dpguard.study.ray_cells import RayCells
from dpguard.study.runner import run
from dpguard.study.spec import Study

address, folder, execute, log, text, model, data = eval(sys.argv[1])
study = Study.read(Document.parse(text, "study.yaml"))
context = {"log": log, "seconds": 0.3}
summary = run(
    study, folder, study.cells(model, data), execute=execute, context=context,
    executor=lambda: RayCells(address, execute, context),
)
print(summary.sentence)
sys.exit(summary.exit_status)
"""


class Nodes:
    """Ray nodes of this machine, each in a session of its own, so that it can be ended whole."""

    def __init__(self, folder):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environ = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1", "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        self.leaders = []

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self, *words):
        script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        process = subprocess.Popen(
            [sys.executable, "-c", script, "start", *words, *common],
            env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
        self.leaders.append(process.pid)

    def head(self):
        self.start(
            "--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            f"--temp-dir={self.folder / 'r'}",
        )  # fmt: skip

    def more(self):
        self.start(f"--address={self.address}")

    def kill(self, leader):
        until = time.monotonic() + 30
        while (left := session(leader)) and time.monotonic() < until:  # one may start another meanwhile
            for pid in left:
                with_suppressed_kill(pid)
            time.sleep(0.05)

    def close(self):
        for leader in self.leaders:
            self.kill(leader)


def with_suppressed_kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def session(leader):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    # socket paths must be short
    folder = tmp_path_factory.mktemp("ray")
    found = Nodes(folder)
    try:
        found.head()
        found.more()
        yield found
    finally:
        found.close()
    assert not [pid for leader in found.leaders for pid in session(leader)]


def contents(folder):
    with Store.open(folder) as store:
        records = [(r.cell, r.status, r.reason, untimed(r.result)) for r in store.records()]
        return records, [store.texts(record[0].id) for record in records]


def provenance(folder):
    with Store.open(folder) as store:
        return [record.provenance for record in store.records()]


def files_with(word, folder):
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def dpguard(*words, environ):
    return subprocess.run(
        [sys.executable, "-m", "dpguard", *map(str, words)], env=environ, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@ray_only
def test_a_real_study_gives_the_records_of_a_local_run_and_no_token(home, nodes, tmp_path):
    path = study(home, tmp_path, ("targets: 2", "targets: 2, at: [start, end]"))
    local = dpguard("run", path, "--out", tmp_path / "local", environ=nodes.environ)
    assert local.returncode == 0, local.stderr
    done = dpguard("run", path, "--out", tmp_path / "ray", "--ray", nodes.address, environ=nodes.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert (tmp_path / "ray" / "frontier.csv").read_text() == (tmp_path / "local" / "frontier.csv").read_text()
    assert {"node", "seconds", "peak_mb"} <= set(provenance(tmp_path / "ray")[0])
    assert "warning" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert files_with(TOKEN, tmp_path) == []
    again = dpguard("run", path, "--out", tmp_path / "ray", "--ray", nodes.address, environ=nodes.environ)
    assert "8 from an earlier run" in again.stdout


@pytest.mark.slow
@ray_only
def test_a_node_whose_texts_differ_fails_its_cells_with_the_reason(home, nodes, tmp_path):
    """The file changes after the driver has read it: as if the nodes had another one."""
    import dpguard.cli.studies as studies
    from dpguard.cli.planning import plan_study
    from dpguard.study.ray_cells import RayCells
    from dpguard.study.runner import run
    from dpguard.study.spec import Study

    copy = tmp_path / "texts.jsonl"
    copy.write_text((home / "texts.jsonl").read_text())
    path = study(home, tmp_path, (str(home / "texts.jsonl"), str(copy)))
    read = Study.load(path)
    planned = plan_study(read, tmp_path / "out")
    copy.write_text(copy.read_text().replace(" ", "  ", 5).replace('"label": 1', '"label": 0', 1))
    before = dict(os.environ)
    os.environ.update(nodes.environ)
    try:
        summary = run(
            planned.study, tmp_path / "out", planned.cells, execute=studies.EXECUTE, context=planned.context,
            quiet=True, executor=lambda: RayCells(nodes.address, studies.EXECUTE, planned.context),
        )  # fmt: skip
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert summary.failed > 0
    assert any("changed since the study was planned" in reason and "(on node " in reason
               for _, reason in summary.failures)  # fmt: skip


@pytest.mark.slow
@ray_only
def test_a_killed_node_loses_nothing(nodes, tmp_path):
    nodes.more()
    lost = nodes.leaders[-1]
    log, arguments = tmp_path / "log", (nodes.address, str(tmp_path / "out"), EXECUTE)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, script, repr((*arguments, str(log), TEXT, MODEL, DATA))],
        env=nodes.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    nodes.kill(lost)
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, out + err
    assert out.count("main is imported") == 1, "no worker imports the driver's script"
    assert TOKEN not in out + err

    from tests.study.conftest import Kit
    from tests.study.test_runner import go

    go(Kit, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    with Store.open(tmp_path / "out") as store:
        assert {record.status for record in store.records()} == {"done"}


@pytest.mark.slow
@ray_only
def test_a_wrong_token_is_one_sentence_without_it(home, nodes, tmp_path):
    path = study(home, tmp_path)
    environ = {**nodes.environ, "RAY_AUTH_TOKEN": TOKEN[::-1]}
    done = dpguard("run", path, "--out", tmp_path / "out", "--ray", nodes.address, environ=environ)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"dpguard: --ray {nodes.address}: " in done.stderr
    assert TOKEN[::-1] not in done.stdout + done.stderr
    assert files_with(TOKEN[::-1], tmp_path) == []


@ray_only
def test_an_address_where_nothing_answers_is_one_sentence(home, told, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = study(home, tmp_path)
    status, out, err = told("run", path, "--out", tmp_path / "out", "--ray", f"127.0.0.1:{port}")
    assert (status, out) == (2, "")
    assert err == (
        f"dpguard: --ray 127.0.0.1:{port}: nothing answers there (Connection refused), expected a running cluster's "
        "head\n"
    )
    assert not (tmp_path / "out").exists()


@ray_only
@pytest.mark.parametrize("address", ["here", "host:", ":6379", "host:0", "host:99999"])
def test_an_address_of_another_form(address):
    with pytest.raises(UserError, match="expected host:port such as"):
        reach(address)


@ray_only
def test_a_dry_run_refuses_an_address_of_another_form(home, told, tmp_path):
    status, out, err = told("run", study(home, tmp_path), "--out", tmp_path / "out", "--ray", "here", "--dry-run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--ray is 'here', expected host:port such as" in err


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_without_ray_the_extra_is_named(home, told, tmp_path, dry):
    status, _out, err = told("run", study(home, tmp_path), "--out", tmp_path / "out", "--ray", "127.0.0.1:6379", *dry)
    assert (status, err.count("\n")) == (2, 1)
    assert "Ray is not installed; expected pip install 'dpguard[ray]'" in err


def test_an_open_cluster_beyond_this_machine_is_warned_of():
    warned = "warning: 10.0.0.1:6379 is not this machine, and no token is set"
    assert exposed("10.0.0.1:6379", {}).startswith(warned)
    assert exposed("ray://head.example:10001", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN})
    for address in ("127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.0.0.1:10001", "auto"):
        assert exposed(address, {}) == ""
    assert exposed("10.0.0.1:6379", {"RAY_AUTH_MODE": "token"}) == ""
    assert TOKEN not in exposed("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN})


def test_paths_mean_the_same_on_every_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "here.jsonl").write_text("")
    context = {
        "folder": "reports/x",
        "model": "model",
        "data": {"path": "here.jsonl", "beside": "studies", "text": "t"},
    }
    assert absolute(context) == {
        "folder": str(tmp_path / "reports/x"),
        "model": str(tmp_path / "model"),
        "data": {"path": str(tmp_path / "here.jsonl"), "beside": str(tmp_path / "studies"), "text": "t"},
    }
    assert absolute({"model": "demo", "data": {"path": "demo"}})["model"] == "demo"
