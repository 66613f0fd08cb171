"""A missing column told with how to name the right one: the texts know their columns, not who asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dpguard.errors import UserError
from dpguard.inputs.tables import NoColumnError
from dpguard.study.spec import Study


@contextmanager
def by_options(text: str, label: str) -> Iterator[None]:
    """On the command line ``--text`` and ``--label`` name columns."""
    try:
        yield
    except NoColumnError as error:
        option = {label: "--label", text: "--text"}[error.column]
        raise error.told(lambda name: f"{option} {name}") from None


@contextmanager
def in_study(study: Study) -> Iterator[None]:
    """In a study ``data`` does; a client's column is asked for by the split."""
    try:
        yield
    except NoColumnError as error:
        if error.column == study.owner_column:
            raise UserError(f"{error.sentence} (asked for by federation.split)", where=error.where) from None
        key = {getattr(study.data, key): key for key in ("entities", "label", "text")}[error.column]
        raise error.told(lambda name: f"data: {{path: ..., {key}: {name}}}") from None
