"""A real browser for the tests: Chromium, driven over its debugging pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--no-sandbox", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds that an answer may take on a busy machine; nothing is measured with it."""


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser(contextlib.AbstractContextManager):
    """One Chromium with one page; `open` a file, then `evaluate`, `press`, `picture`.

    Attributes:
        console: everything the page wrote to the console, and everything the browser complained about.
        requests: every address asked for since the page was opened.
    """

    def __init__(self, path: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="dpguard-chromium-")
        self.console: list[str] = []
        self.requests: list[str] = []
        self._events: list[dict] = []
        self._number, self._rest = 0, b""
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        command = [path, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        # the browser reads from descriptor 3 and writes to 4
        script = f"exec {shlex.join(command)} 3<&{read} 4>&{write}"
        self._process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        target = self._page()
        answer = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", {"enabled": True})

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close", session=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _page(self) -> str:
        """The id of the empty page; a browser that is still starting lists others before it."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for found in self.call("Target.getTargets", session=False)["targetInfos"]:
                if found["type"] == "page" and found["url"] == "about:blank":
                    return found["targetId"]
            time.sleep(0.05)
        raise TimeoutError("the browser opened no page")

    def call(self, method: str, params: dict | None = None, *, session: bool = True) -> dict:
        """Send one command and wait for its answer; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self._note(found)

    def _read(self) -> dict:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {PATIENCE:.0f} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._events.append(event)
        if method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"].get("text")))
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, page: Path, *, width: int = 1200, height: int = 900, scheme: str = "light", script: bool = True):
        """Open a file at a width, by day ("light") or by night ("dark"), with or without scripts."""
        self.console.clear()
        self.requests.clear()
        self._events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", size)
        self.media(scheme)
        self.call("Emulation.setScriptExecutionDisabled", {"value": not script})
        self.call("Page.navigate", {"url": page.resolve().as_uri()})
        until = time.monotonic() + PATIENCE
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            if time.monotonic() > until:
                raise TimeoutError("the page did not load")
            self._note(self._read())
        # evaluation by the debugger works all the same; only the page's own scripts are held back
        self.call("Emulation.setScriptExecutionDisabled", {"value": False})

    def media(self, scheme: str = "light", media: str = "") -> None:
        """Prefer a colour scheme; with ``media="print"`` show the page as it is printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def evaluate(self, script: str) -> object:
        """The value of a JavaScript expression, as plain data."""
        answer = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key: Tab, Enter, Escape, ..."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", **common, **text})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def hover(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """What is on the screen, or the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})["data"]
        path.write_bytes(base64.b64decode(data))
        return path
