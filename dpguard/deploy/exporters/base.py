"""What a framework's exporter is: one file in this folder that assigns ``PLUGIN = Exporter(...)``.

Its project lies in ``deploy/projects/<name>/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpguard.deploy.rehearsal import Rehearsal


def anything(made: Rehearsal) -> None:
    """A framework that can carry every policy."""


def nothing(made: Rehearsal) -> dict[str, str]:
    """A project without values of its own."""
    return {}


@dataclass(frozen=True)
class Exporter:
    """One framework.

    Attributes:
        meaning: what is exported, in one line.
        check: raises a UserError for a policy that the framework cannot carry.
        values: further values for the project's files.
    """

    meaning: str
    check: Callable[[Rehearsal], None] = anything
    values: Callable[[Rehearsal], dict[str, str]] = nothing
