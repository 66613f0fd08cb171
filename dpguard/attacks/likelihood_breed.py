"""Children of texts: one or two words anew, crossed with another text, a stretch of a third, other orders.

Every operator maps a parent (and what it needs besides) to one child of the same length; a child may be its parent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Body = tuple[int, ...]


@dataclass(frozen=True)
class Stock:
    """What children are made of.

    Attributes:
        draws: of all choices.
        word: (text, place) -> a word that fits there.
        form: word -> another one with a similar embedding.
        mates: texts of the same length, the best first.
        strangers: texts of any length.
    """

    draws: random.Random
    word: Callable[[Sequence[int], int], int]
    form: Callable[[int], int]
    mates: Sequence[Body]
    strangers: Sequence[Body]


def word(body: Body, stock: Stock) -> Body:
    """Another word at one place."""
    place = stock.draws.randrange(len(body))
    return (*body[:place], stock.word(body, place), *body[place + 1 :])


def two_words(body: Body, stock: Stock) -> Body:
    """Other words at two places, half of the time neighbours."""
    first = stock.draws.randrange(len(body))
    beside = stock.draws.random() < 0.5 and first + 1 < len(body)
    child = list(body)
    for place in (first, first + 1 if beside else stock.draws.randrange(len(body))):
        child[place] = stock.word(child, place)
    return tuple(child)


def form(body: Body, stock: Stock) -> Body:
    """A word in another form, or one that is used alike."""
    place = stock.draws.randrange(len(body))
    return (*body[:place], stock.form(body[place]), *body[place + 1 :])


def cross(body: Body, stock: Stock) -> Body:
    """A mate's words at random places, or in one stretch."""
    mate = stock.draws.choice(stock.mates)
    if stock.draws.random() < 0.5:
        return tuple(a if stock.draws.random() < 0.5 else b for a, b in zip(body, mate, strict=True))
    first, last = sorted(stock.draws.randrange(len(body)) for _ in range(2))
    return body[:first] + mate[first : last + 1] + body[last + 1 :]


def transplant(body: Body, stock: Stock) -> Body:
    """Two to four neighbouring words of a mate or a stranger, put over any stretch."""
    other = stock.draws.choice(stock.strangers if stock.strangers and stock.draws.random() < 0.5 else stock.mates)
    width = stock.draws.randint(2, 4)
    if min(len(other), len(body)) < width:
        return body
    start, into = stock.draws.randrange(len(other) - width + 1), stock.draws.randrange(len(body) - width + 1)
    return body[:into] + other[start : start + width] + body[into + width :]


def swap(body: Body, stock: Stock) -> Body:
    """Two words exchanged."""
    child = list(body)
    i, j = (stock.draws.randrange(len(body)) for _ in range(2))
    child[i], child[j] = child[j], child[i]
    return tuple(child)


def move(body: Body, stock: Stock) -> Body:
    """A stretch of one to three words elsewhere.

    >>> one = Stock(random.Random(1), lambda text, place: 9, lambda token: 8, [(1, 2, 3)], [])
    >>> sorted(move((1, 2, 3), one))
    [1, 2, 3]
    """
    width = stock.draws.randint(1, 3)
    if len(body) <= width:
        return body
    start = stock.draws.randrange(len(body) - width + 1)
    rest = body[:start] + body[start + width :]
    into = stock.draws.randint(0, len(rest))
    return rest[:into] + body[start : start + width] + rest[into:]


def shift(body: Body, stock: Stock) -> Body:
    """One word dropped and a fresh one put in elsewhere, for texts that are right but shifted."""
    out, into = (stock.draws.randrange(len(body)) for _ in range(2))
    rest = body[:out] + body[out + 1 :]
    child = (*rest[:into], body[out], *rest[into:])
    return (*child[:into], stock.word(child, into), *child[into + 1 :])


OPERATORS: dict[str, tuple[Callable[[Body, Stock], Body], float]] = {
    "word": (word, 6.0),
    "two words": (two_words, 3.0),
    "form": (form, 1.0),
    "cross": (cross, 3.0),
    "transplant": (transplant, 2.0),
    "swap": (swap, 1.0),
    "move": (move, 1.5),
    "shift": (shift, 1.5),
}
"""Operators, and how often each is used before it has shown what it is worth."""
