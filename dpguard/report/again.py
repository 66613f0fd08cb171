"""The commands that run a study again: one policy of it, or just what a report has of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from dpguard.report.board import CONTROL
from dpguard.report.result import StudyResult
from dpguard.report.text import visible

NAMED = 6
"""How many policies a sentence names before it counts the others."""
_COMMAND = re.compile(r"[\w .,:;=+*%/\[\]()-]{1,160}", re.ASCII)
"""Names of policies that a page can print inside a command; others would be read as something else somewhere."""
_OUT = "--out again"


def just(policies: Sequence[str]) -> str:
    """What makes ``dpguard run STUDY`` run these policies, with the control that they are compared with.

    Empty where one of them has a name that a page cannot print inside a command.

    >>> just(["part block=3"])
    "--only 'part block=3' --out again"
    """
    if not all(_COMMAND.fullmatch(policy) for policy in policies):
        return ""
    return " ".join([*(f"--only {shlex.quote(policy)}" for policy in policies), _OUT])


def reproduce(result: StudyResult) -> str:
    """What follows ``dpguard run STUDY`` to make this report; empty where the whole study was asked for.

    The control comes by itself, so it is named only where nothing else was asked for. ``POLICY`` stands for names that
    cannot be printed in a command.
    """
    if not result.left_out:
        return ""
    asked = [policy for policy in result.policies if policy != CONTROL] or [CONTROL]
    return just(asked) or f"--only POLICY {_OUT}"


def left_out(result: StudyResult) -> str:
    """Which policies of the study a report made with ``--only`` lacks; empty where it has all.

    >>> left_out(StudyResult({"spec": {"policies": ["none", "a"], "left_out": ["b", "c"]}}, []))
    "2 of the study's 4 policies were not asked for (--only): b, c."
    """
    others = result.left_out
    if not others:
        return ""
    every = len(set(result.policies) | set(others))
    named = ", ".join(visible(name, limit=60) for name in others[:NAMED])
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    were = "was" if len(others) == 1 else "were"
    return f"{len(others)} of the study's {every} policies {were} not asked for (--only): {named}{more}."
