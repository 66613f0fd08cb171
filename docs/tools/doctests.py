"""Doctests in docstrings become code blocks of the API page; otherwise Markdown would read them as text."""

from __future__ import annotations

import re
from typing import Any

import griffe

_BLOCK = re.compile(r"(?m)(?:^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*\n?)+")


def fenced(text: str) -> str:
    """The text with every run of doctest lines between fences."""
    return _BLOCK.sub(
        lambda m: (
            f"{m['indent']}```pycon\n{m[0].rstrip()}\n{m['indent']}```\n" + ("\n" if m[0].endswith("\n\n") else "")
        ),
        text,
    )


class Doctests(griffe.Extension):
    """Fences the doctests of everything that is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
