"""What every record says of where it comes from: versions and git revision. No torch here, and no host name."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PATIENCE = 10.0  # seconds that git may take; a revision is not worth more


def of_run(study: str | Path) -> dict[str, Any]:
    """What all records of a run share.

    Args:
        study: the study's file.

    >>> found = of_run("/nowhere/study.yaml")
    >>> sorted(found), sorted(found["versions"])[:3]
    (['git', 'versions'], ['dpguard', 'opacus', 'platform'])
    """
    return {"versions": versions(), "git": revision(study)}


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in ("dpguard", "torch", "transformers", "opacus"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision(study: str | Path) -> dict[str, Any] | None:
    """The git revision of the study file's folder, or else of dpguard's own checkout; None where there is none.

    Returns:
        ``revision`` (40 hex digits), ``dirty`` (a tracked file differs from it), ``of`` (``study`` or ``dpguard``).
    """
    for of, folder in (("study", Path(study).resolve().parent), ("dpguard", Path(__file__).resolve().parent)):
        head = _git(folder, "rev-parse", "--verify", "HEAD")
        if head:
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return {"revision": head, "dirty": changed is None or bool(changed), "of": of}
    return None


def _git(folder: Path, *words: str) -> str | None:
    """What git says, None when it does not know (no git, no repository, not ours to read, too slow)."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
