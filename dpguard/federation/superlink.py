"""Flower's simulation engine, run from start to end: a SuperLink of its own, one app, and nothing left running; or an
app on a SuperLink that is there.

``flwr run`` alone starts a SuperLink that stays, and lets it install an app's dependencies. Here the SuperLink has a
home and a port of its own, installs nothing, reports nothing home, and ends with the call, or with the process that
called should that be killed (`keeper`).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpguard.errors import UserError
from dpguard.federation import keeper
from dpguard.federation.keeper import MARK

START_SECONDS = 60.0
ANSWER_SECONDS = 10.0
NAME = "here"
_STARTED = re.compile(r"started run (\d+)")


def simulate(
    app: str | Path,
    *,
    nodes: int,
    settings: Sequence[str] = (),
    cpus: int = 1,
    scratch: Sequence[Path] = (),
    prepare: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> None:
    """Run a Flower app on Flower's simulation engine.

    Args:
        app: folder of the app (its pyproject.toml names ServerApp and ClientApp).
        nodes: how many clients.
        settings: ``name=value`` in TOML, of the app's configuration. ``state`` is set to ``APP/state`` unless given.
        cpus: processor cores for the clients together.
        scratch: folders that nobody needs once this process is gone; they are removed should it be killed.
        prepare: writes into them what nobody else may find: called once their removal is certain.
        say: called with every line that the app logs.

    Raises:
        UserError: Flower is not installed, its SuperLink does not answer, or the run does not end well.
    """
    app, given = _checked(app), list(settings)
    if not any(setting.startswith("state=") for setting in given):
        given.append(f"state={json.dumps(str(app / 'state'))}")
    with tempfile.TemporaryDirectory(prefix="dpg") as home, _superlink(Path(home), scratch) as environment:
        prepare()
        resources = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={cpus}"
        _run(app, environment, given, say, ["--federation-config", resources])


def submit(
    app: str | Path,
    address: str,
    *,
    certificates: str | Path | None = None,
    settings: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Run a Flower app on a federation that is there: a SuperLink, with the sites' SuperNodes connected to it.

    Args:
        app: folder of the app.
        address: host:port of the SuperLink.
        certificates: the file of root certificates to check it by; None = no encryption, for tests on one machine.
        settings: ``name=value`` in TOML, of the app's configuration.
        say: called with every line that the app logs.

    Raises:
        UserError: Flower is not installed, no SuperLink answers there, or the run does not end well.
    """
    app = _checked(app)
    if certificates is not None and not Path(certificates).is_file():
        raise UserError(f"there is no file {certificates}; expected the SuperLink's root certificates")
    why = _silence(address, certificates)
    if why:
        raise UserError(
            f"no SuperLink answers at {address} ({why}); expected the host:port of one that runs (flower-superlink)"
        )
    with tempfile.TemporaryDirectory(prefix="dpg") as home:
        trust = f"root-certificates = {json.dumps(str(Path(certificates).resolve()))}" if certificates else ""
        environment = _environment(Path(home), address, trust or "insecure = true")
        _run(app, environment, list(settings), say, [])


def _checked(app: str | Path) -> Path:
    if not installed():
        raise UserError("Flower is not installed; expected pip install 'dpguard[flower]'")
    app = Path(app).resolve()
    if not (app / "pyproject.toml").is_file():
        raise UserError(f"{app} is no Flower app; expected a folder with a pyproject.toml")
    return app


def _run(
    app: Path, environment: dict[str, str], settings: Sequence[str], say: Callable[[str], None], more: Sequence[str]
) -> None:
    """``flwr run`` to its end, and how the run ended."""
    words = [_tool("flwr"), "run", str(app), NAME, "--stream", *more]
    for setting in settings:
        words += ["--run-config", setting]
    number = said = ""
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout or ():
            say(line.rstrip("\n"))
            started = _STARTED.search(line)
            number = started.group(1) if started else number
            said = line.strip() if "Error" in line or "Unable" in line else said
    status = _status(environment, number) if run.returncode == 0 else f"flwr run has exit status {run.returncode}"
    if status != "finished:completed":
        why = f"{status}; {said}" if said else status
        raise UserError(f"the run did not end well ({why}); expected a completed run")


def installed() -> bool:
    """Whether the [flower] extra is there."""
    return importlib.util.find_spec("flwr") is not None


@contextlib.contextmanager
def _superlink(home: Path, scratch: Sequence[Path]) -> Iterator[dict[str, str]]:
    """A SuperLink in ``home``; yields the environment in which ``flwr`` finds it."""
    port = _free_port()
    mark = f"{os.getpid()}-{port}"
    environment = {**_environment(home, f"127.0.0.1:{port}", "insecure = true"), MARK: mark}
    words = [
        _tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    log = home / "superlink.log"
    link = keeper.start(words, environment=environment, log=log, folders=(home, *scratch))
    try:
        _wait_for(link, port, log)
        yield environment
    finally:
        keeper.stop(link, mark)


def _environment(home: Path, address: str, trust: str) -> dict[str, str]:
    """Variables with which ``flwr`` knows one SuperLink by `NAME`, and nothing reports home."""
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = {json.dumps(address)}\n{trust}\n', "utf-8"
    )
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # Flower calls its own by name
    return {
        **os.environ, "PATH": commands, "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(home),
    }  # fmt: skip


def _wait_for(link: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and link.poll() is None:
        if not _silence(f"127.0.0.1:{port}", None):
            return
        time.sleep(0.2)
    tail = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    raise UserError(f"Flower's SuperLink does not answer ({' '.join(tail) or 'no word from it'}); expected it to start")


def _silence(address: str, certificates: str | Path | None) -> str:
    """Why no SuperLink answers at an address; empty when one does."""
    try:
        trusted = ssl.create_default_context(cafile=str(certificates)) if certificates else None
        scheme = "https" if certificates else "http"
        with urllib.request.urlopen(f"{scheme}://{address}/health", timeout=ANSWER_SECONDS, context=trusted):
            return ""  # any other answer than success raises
    except urllib.error.HTTPError as error:
        return f"something else answers, with status {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", "") or error or type(error).__name__)


def _status(environment: dict[str, str], number: str) -> str:
    """How a run of this SuperLink ended; its newest without a number."""
    done = subprocess.run(
        [_tool("flwr"), "ls", NAME, "--format", "json", *(["--run-id", number] if number else [])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        return str(json.loads(done.stdout)["runs"][0]["status"])
    return f"its status cannot be read: {(done.stderr or done.stdout).strip()[:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tool(name: str) -> str:
    """A command of the Flower that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))
