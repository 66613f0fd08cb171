"""A report as PDF, through a Chromium that is installed: the page has a print style of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dpguard.errors import UserError
from dpguard.report.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
NAME = "report.pdf"
PATIENCE = 180
"""Seconds after which a browser that prints nothing is given up."""
_FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--no-pdf-header-footer",
)  # fmt: skip


def browser() -> str:
    """The path of a Chromium.

    Raises:
        UserError: none is installed; it says how to print without.
    """
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise UserError(
        "no Chromium or Chrome was found to make report.pdf; open report.html in any browser and print it to a file: "
        "it has a print style"
    )


def to_pdf(page: Path) -> Path:
    """Print a page to a PDF beside it; its bytes are the browser's and differ from run to run.

    Raises:
        UserError: no browser, or it did not print.
    """
    path, target = browser(), page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(prefix="dpguard-print-") as scratch:
        made = Path(scratch) / NAME
        command = [path, *_FLAGS, f"--user-data-dir={scratch}/profile", f"--print-to-pdf={made}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to run as root with it, as in a container
        try:
            done = subprocess.run(
                [*command, page.resolve().as_uri()],
                check=False, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"{path} printed nothing in {PATIENCE} s; print {page} from a browser instead") from None
        if done.returncode != 0 or not made.is_file():
            raise UserError(f"{path} could not print {page} (exit {done.returncode}); print it from a browser instead")
        with replacing(target) as part:
            shutil.move(made, part)
    return target
