"""The texts of a study, read once a process; a mistake in them is told before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpguard.inputs import texts
from dpguard.inputs.texts import Corpus


@lru_cache(maxsize=1)
def load_corpus(key: tuple[tuple[str, str], ...]) -> Corpus:
    """The study's texts, once a process."""
    arguments: dict[str, Any] = dict(key)
    root = Path(arguments.pop("beside", "."))
    return texts.load(locate=lambda name: root / name if (root / name).exists() else Path(name), **arguments)


def corpus_of(context: Mapping[str, Any]) -> Corpus:
    """The corpus that a context names."""
    return load_corpus(tuple(sorted((k, v) for k, v in context["data"].items() if v is not None)))
