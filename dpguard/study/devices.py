"""Which CUDA devices a run may use, found without torch: the driver imports none."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell

DRIVER_FILES = Path("/proc/driver/nvidia/gpus")
"""One entry a GPU, where NVIDIA's kernel driver is loaded."""
_PATIENCE = 10.0  # seconds that nvidia-smi may take
_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


def takes_device(cell: Cell, kept: Callable[[str], bool] = lambda trained: True) -> bool:
    """Whether a cell runs on a device where there is one.

    Central training does, and an attack on its weights when they are gone, because it trains them again; guarantees,
    all other attacks and federations do not.

    Args:
        cell: the cell.
        kept: whether the weights that a utility cell ended with are there.
    """
    if "federation" in cell.settings:
        return False
    return cell.leg == "utility" or (NEEDS in cell.settings and not kept(cell.settings[NEEDS]))


def _listed() -> str:
    """What ``nvidia-smi -L`` prints, "" without it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def chosen(
    asked: str,
    environ: Mapping[str, str],
    *,
    files: Path = DRIVER_FILES,
    listed: Callable[[], str] = _listed,
) -> tuple[str, ...]:
    """The devices of a run, each as CUDA_VISIBLE_DEVICES names it; () = the CPU.

    Args:
        asked: ``auto`` (all that this process may use), ``none``, or a list such as ``0,1``.
        environ: CUDA_VISIBLE_DEVICES in it says what may be used, "" or -1 that nothing may.
        files: folder with one entry a GPU.
        listed: gives one line a GPU, as ``nvidia-smi -L``.

    Raises:
        UserError: a list that names no device, or one twice.

    >>> chosen("auto", {"CUDA_VISIBLE_DEVICES": "2,3"}), chosen("none", {"CUDA_VISIBLE_DEVICES": "2"}), chosen("1", {})
    (('2', '3'), (), ('1',))
    """
    if asked == "none":
        return ()
    if asked != "auto":
        return _parsed(asked)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        usable = [bool(_NAME.fullmatch(name)) for name in names]
        return tuple(
            names[: usable.index(False)] if False in usable else names
        )  # CUDA, too, stops at the first bad one
    try:
        count = sum(1 for _ in files.iterdir())
    except OSError:
        count = sum(line.startswith("GPU ") for line in listed().splitlines())
    return tuple(str(index) for index in range(count))


def _parsed(asked: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in asked.split(","))
    if any(not _NAME.fullmatch(name) for name in names) or len(set(names)) != len(names):
        raise UserError(f"--devices is {asked!r}, expected auto, none, or each device once, such as 0,1")
    return names
