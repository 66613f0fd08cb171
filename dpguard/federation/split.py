"""Whose text is whose: every client gets texts of its own, by chance, by label, or by a column. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpguard.errors import UserError
from dpguard.federation.settings import Settings, Split, derive
from dpguard.inputs.texts import Example

Parts = tuple[tuple[int, ...], ...]
"""For every client the indices of its texts, in increasing order."""
TRIES = 1000
"""Dirichlet draws before it is given up that every client gets a text."""


def split(train: Sequence[Example], test: Sequence[Example], settings: Settings) -> tuple[Parts, Parts]:
    """Training and held-out texts by client; a pure function of the texts and ``split_seed``.

    Held-out texts go the same way as training texts: evenly, in the client's own proportions of labels, or by the
    value of the column. Every text has one owner; a client may be without a held-out text, never without a training
    text.

    Args:
        train: the clients' texts.
        test: held-out texts.
        settings: the federation.

    Returns:
        (training parts, held-out parts).

    Raises:
        UserError: more clients than texts, a column that is missing or has too few values, or a split that leaves a
            client without a text; ``loc`` is in the federation's settings.
    """
    if settings.clients > len(train):
        raise UserError(
            f"clients: {settings.clients} is more than the {len(train)} training texts, expected at most {len(train)}",
            loc=("clients",),
        )
    how = Split.parse(settings.split)
    if how.kind == "iid":
        return _even(train, settings, "train"), _even(test, settings, "test")
    if how.kind == "column":
        return _by_column(train, test, how.column, settings)
    return _dirichlet(train, test, how.concentration, settings)


def _generator(settings: Settings, what: str) -> np.random.Generator:
    return np.random.default_rng(derive(settings.split_seed, f"split {what}"))


def _parts(owners: Sequence[int], clients: int) -> Parts:
    lists: list[list[int]] = [[] for _ in range(clients)]
    for index, owner in enumerate(owners):
        lists[owner].append(index)
    return tuple(tuple(each) for each in lists)


def _even(examples: Sequence[Example], settings: Settings, what: str) -> Parts:
    owners = np.arange(len(examples)) % settings.clients
    return _parts(_generator(settings, what).permutation(owners).tolist(), settings.clients)


def _dirichlet(
    train: Sequence[Example], test: Sequence[Example], concentration: float, settings: Settings
) -> tuple[Parts, Parts]:
    """Every label's texts in proportions drawn from Dirichlet(concentration) over clients (Hsu et al., 1909.06335)."""
    generator = _generator(settings, "dirichlet")
    classes = 1 + max(e.label for e in (*train, *test))
    for _ in range(TRIES):
        shares = generator.dirichlet([concentration] * settings.clients, classes)
        found = _in_shares(train, shares, generator)
        if min(len(part) for part in found) > 0:
            return found, _in_shares(test, shares, generator)
    raise UserError(
        f"split: dirichlet({concentration:g}) leaves a client without a text in {TRIES} draws, expected a larger "
        f"concentration or fewer than {settings.clients} clients",
        loc=("split",),
    )


def _in_shares(
    examples: Sequence[Example],
    shares: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    generator: np.random.Generator,
) -> Parts:
    owners = np.zeros(len(examples), dtype=np.int64)
    labels = np.array([e.label for e in examples], dtype=np.int64)
    for label, share in enumerate(shares):
        indices = generator.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(share) * len(indices)).astype(np.int64)
        ends[-1] = len(indices)
        for client, part in enumerate(np.split(indices, ends[:-1])):
            owners[part] = client
    return _parts(owners.tolist(), shares.shape[1])


def _by_column(
    train: Sequence[Example], test: Sequence[Example], column: str, settings: Settings
) -> tuple[Parts, Parts]:
    """Every value of the column is one client's; with more values than clients, the largest go to the emptiest."""
    missing = next((e for e in (*train, *test) if e.owner is None), None)
    if missing is not None:
        raise UserError(
            f"split: a text has no {column!r} ({missing.where or 'no place'}), expected texts loaded with that column",
            loc=("split",),
        )
    counts: dict[str, int] = {}
    for example in train:
        counts[str(example.owner)] = counts.get(str(example.owner), 0) + 1
    if len(counts) < settings.clients:
        raise UserError(
            f"split: column {column!r} has {len(counts)} values, fewer than the {settings.clients} clients, expected "
            f"clients: {len(counts)} or less",
            loc=("split",),
        )
    filled, owner_of = [0] * settings.clients, {}
    for value in sorted(counts, key=lambda v: (-counts[v], v)):
        owner_of[value] = min(range(settings.clients), key=lambda client: (filled[client], client))
        filled[owner_of[value]] += counts[value]
    # a value that no client trains on goes round in turn: somebody must answer for it
    strangers = {v: i % settings.clients for i, v in enumerate(sorted({str(e.owner) for e in test} - set(owner_of)))}
    owners = {**strangers, **owner_of}
    return (
        _parts([owners[str(e.owner)] for e in train], settings.clients),
        _parts([owners[str(e.owner)] for e in test], settings.clients),
    )
