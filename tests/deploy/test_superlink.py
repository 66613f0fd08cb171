"""The exported Flower app on a federation that is there: what goes to the SuperLink, and two sites with real text."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the [flower] extra is not installed")

from dpguard.deploy import training
from dpguard.deploy.export import export
from dpguard.errors import UserError
from dpguard.federation import superlink
from dpguard.policy.ledger import Ledger
from tests.deploy import cases, records
from tests.federation.test_keeper import until

FEDERATION = {"clients": 2, "per_round": 2, "rounds": 4, "local_steps": 2, "batch_size": 4, "learning_rate": 0.05}
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}  # fmt: skip


@pytest.fixture
def exported(tmp_path):
    home = records.home(tmp_path / "h")
    return export(
        records.study(tmp_path / "s", home, federation=FEDERATION), to="flower", policy="dp", out=tmp_path / "e"
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_text_and_no_ledger_goes_to_the_superlink(exported, tmp_path):
    """Flower packs every .jsonl and .json file of an app's folder unless the app says which."""
    folder = exported.folder
    (folder / "texts.jsonl").write_text('{"text": "the patient called", "label": 0}\n')
    (folder / "state" / "client-0").mkdir(parents=True)
    (folder / "state" / "client-0" / "dpguard-ledger.json").write_text("{}")
    done = subprocess.run(
        ["flwr", "build", "--app", str(folder)],
        cwd=tmp_path, env={**ENVIRONMENT, "FLWR_HOME": str(tmp_path / "home")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as packed:
        names = {name for name in packed.namelist() if not name.startswith(".info")}
    assert names == {
        "pyproject.toml", "README.md", "card.md", "card.json", "policy.yaml", "rehearsal.json",
        "federation_app/__init__.py", "federation_app/client_app.py", "federation_app/server_app.py",
    }  # fmt: skip


def test_a_superlink_that_does_not_answer_is_one_sentence(exported, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"no SuperLink answers at {address} .*refused.*; expected the host:port"):
        superlink.submit(exported.folder, address)
    with pytest.raises(UserError, match="no SuperLink answers at nowhere "):
        superlink.submit(exported.folder, "nowhere")
    with pytest.raises(UserError, match="root certificates"):
        superlink.submit(exported.folder, address, certificates=tmp_path / "ca.pem")


def test_the_exported_program_ends_with_status_2(exported):
    def told(*given):
        words = [sys.executable, "run_federation.py", *given]
        done = subprocess.run(words, cwd=exported.folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, said = told(f"127.0.0.1:{free_port()}", "--insecure")
    assert status == 2
    assert said.startswith("dpguard: no SuperLink answers")
    status, said = told("127.0.0.1:8000")
    assert status == 2
    assert "--root-certificates FILE or --insecure" in said


@contextlib.contextmanager
def running(words, log):
    """A process of Flower's, ended by its id."""
    with log.open("w") as file:
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def site(exported, folder, address, name, texts):
    own = {
        "dpguard-folder": str(exported.folder), "dpguard-state": str(folder / name), "dpguard-client": name,
        "data": str(texts),
    }  # fmt: skip
    given = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
    words = [
        "flower-supernode",
        "--insecure",
        "--superlink",
        address,
        "--port",
        str(free_port()),
        "--node-config",
        given,
    ]
    return running(words, folder / f"{name}.log")


@pytest.mark.slow
def test_two_sites_with_real_text_on_a_deployed_superlink(exported, tmp_path):
    """As the exported README says, on loopback: every message is made by a process of its own."""
    texts, port = tmp_path / "h" / "texts.jsonl", free_port()
    address = f"127.0.0.1:{port}"
    link = ["flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]

    def answers():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=5):
            return True
        return False

    with (
        running(link, tmp_path / "link.log"),
        site(exported, tmp_path, address, "ward 1", texts),
        site(exported, tmp_path, address, "ward 2", texts),
    ):
        assert until(answers, 120), (tmp_path / "link.log").read_text()
        weights = tmp_path / "last.safetensors"
        superlink.submit(
            exported.folder, address, settings=["rounds=2", f"weights={json.dumps(str(weights))}"], say=print
        )
        after, before = load_file(weights), training.first_weights(cases.model())
        assert set(after) == set(before)
        assert any(not torch.equal(after[n], before[n]) for n in before)
        for name in ("ward 1", "ward 2"):
            with Ledger(name, exported.rehearsal.model.kind, 1e-3, path=Ledger.beside(tmp_path / name)) as ledger:
                assert ledger.messages == 4
