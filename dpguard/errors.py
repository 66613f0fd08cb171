"""The one kind of error a user is meant to read: a single sentence, no traceback, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user wrote cannot be meant.

    ``sentence`` says what was found, what was expected and the nearest right name. ``loc`` is the path of
    keys to the value (``("policies", "mine", "rows", 0, "clip")``), so that whoever read the file can add
    the file, line and column as ``where``.

    >>> str(UserError("clip is 'no', expected a number above 0", where="p.yaml:2:5"))
    "p.yaml:2:5: clip is 'no', expected a number above 0"
    """

    def __init__(self, sentence: str, *, loc: tuple[str | int, ...] = (), where: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.loc = loc
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}" if self.where else self.sentence


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause naming the nearest known word, or all known words when none is near.

    >>> did_you_mean("layres", ["layers", "clip"])
    "; did you mean 'layers'?"
    >>> did_you_mean("dp-sdg", ["dp-sgd noise=0.5", "dp-sgd noise=1"])
    "; did you mean 'dp-sgd noise=0.5' or another 'dp-sgd'?"
    >>> did_you_mean("zzz", ["layers", "clip"])
    '; expected one of: clip, layers'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    families = {name.partition(" ")[0]: name for name in reversed(names) if " " in name}
    if swept := difflib.get_close_matches(str(word), families, n=1, cutoff=0.6):
        return f"; did you mean {families[swept[0]]!r} or another {swept[0]!r}?"
    return f"; expected one of: {', '.join(names)}" if names else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A clause naming the file or folder that is spelt most alike, or "" when none is near; endings do not count.

    >>> nearest_name("stduy.yaml", ["study.yaml", "other.yaml"])
    "; did you mean 'study.yaml'?"
    >>> nearest_name("nosuch.yaml", ["33-sum.yaml"])
    ''
    """

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    near = [one for one in sorted(known) if alike(_stem(name), _stem(one)) >= 0.6]
    return f"; did you mean {max(near, key=lambda one: alike(name, one))!r}?" if near else ""


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name
