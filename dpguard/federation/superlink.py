"""Flower's simulation engine, run from start to end: a SuperLink of its own, one app, and nothing left running.

``flwr run`` alone starts a SuperLink that stays, and lets it install an app's dependencies. Here the SuperLink is a
child with a home and a port of its own, installs nothing, reports nothing home, and ends with the call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpguard.errors import UserError

START_SECONDS = 60.0
STOP_SECONDS = 10.0
NAME = "here"
MARK = "DPGUARD_SIMULATION"
"""Environment variable by which the processes of one simulation are recognised when it ends."""


def simulate(
    app: str | Path,
    *,
    nodes: int,
    settings: Sequence[str] = (),
    cpus: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Run a Flower app on Flower's simulation engine.

    Args:
        app: folder of the app (its pyproject.toml names ServerApp and ClientApp).
        nodes: how many clients.
        settings: ``name=value`` in TOML, of the app's configuration. ``state`` is set to ``APP/state`` unless given.
        cpus: processor cores for the clients together.
        say: called with every line that the app logs.

    Raises:
        UserError: Flower is not installed, its SuperLink does not answer, or the run does not end well.
    """
    if not installed():
        raise UserError("Flower is not installed; expected pip install 'dpguard[flower]'")
    app = Path(app).resolve()
    if not (app / "pyproject.toml").is_file():
        raise UserError(f"{app} is no Flower app; expected a folder with a pyproject.toml")
    given = list(settings)
    if not any(setting.startswith("state=") for setting in given):
        given.append(f"state={json.dumps(str(app / 'state'))}")
    with tempfile.TemporaryDirectory(prefix="dpg") as home, _superlink(Path(home)) as environment:
        words = [
            _tool("flwr"), "run", str(app), NAME, "--stream",
            "--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={cpus}",
        ]  # fmt: skip
        for setting in given:
            words += ["--run-config", setting]
        with subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            said = ""
            for line in run.stdout or ():
                say(line.rstrip("\n"))
                said = line.strip() if "Error" in line or "Unable" in line else said
        status = _status(environment) if run.returncode == 0 else f"flwr run ended with exit status {run.returncode}"
        if status != "finished:completed":
            why = f"{status}; {said}" if said else status
            raise UserError(f"the simulation did not end well ({why}); expected a completed run")


def installed() -> bool:
    """Whether the [flower] extra is there."""
    return importlib.util.find_spec("flwr") is not None


@contextlib.contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in ``home``; yields the environment in which ``flwr`` finds it."""
    port = _free_port()
    mark = f"{os.getpid()}-{port}"
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # Flower calls its own by name
    environment = {
        **os.environ, "PATH": commands, "FLWR_HOME": str(home), MARK: mark,
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(home),
    }  # fmt: skip
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    words = [
        _tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with (home / "superlink.log").open("w") as log:
        link = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(link, port, home / "superlink.log")
            yield environment
        finally:
            _stop(link, mark)


def _wait_for(link: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and link.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0):
            return  # any other answer than success raises
        time.sleep(0.2)
    tail = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    raise UserError(f"Flower's SuperLink does not answer ({' '.join(tail) or 'no word from it'}); expected it to start")


def _status(environment: dict[str, str]) -> str:
    """How the one run of this SuperLink ended."""
    done = subprocess.run(
        [_tool("flwr"), "ls", NAME, "--format", "json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        return str(json.loads(done.stdout)["runs"][0]["status"])
    return f"its status cannot be read: {(done.stderr or done.stdout).strip()[:200]}"


def _stop(link: subprocess.Popen[bytes], mark: str) -> None:
    """End the SuperLink, then whatever of this simulation is left: by process id, found by its own mark."""
    link.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        link.wait(STOP_SECONDS)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        left = _marked(mark)
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, sent)
        deadline = time.monotonic() + STOP_SECONDS
        while left and _marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
    link.wait(STOP_SECONDS)


def _marked(mark: str) -> list[int]:
    """Processes that were started with this simulation's mark; empty where /proc does not tell."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in variables and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tool(name: str) -> str:
    """A command of the Flower that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))
