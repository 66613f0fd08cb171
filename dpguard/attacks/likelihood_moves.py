"""Other texts near a text: its words in other orders, crossed with another text, or one word elsewhere."""

from __future__ import annotations

import random

Body = tuple[int, ...]


def reorderings(body: Body) -> list[Body]:
    """Every swap of two places, and every move of a stretch of one to four, without the text itself.

    >>> reorderings((1, 2))
    [(2, 1)]
    """
    found: dict[Body, None] = {}
    for i in range(len(body)):
        for j in range(i + 1, len(body)):
            swapped = list(body)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            found[tuple(swapped)] = None
        for width in range(1, min(4, len(body) - i) + 1):
            stretch, rest = body[i : i + width], body[:i] + body[i + width :]
            for j in range(len(rest) + 1):
                found[rest[:j] + stretch + rest[j:]] = None
    found.pop(body, None)
    return list(found)


def crossings(one: Body, two: Body, draws: random.Random, count: int) -> list[Body]:
    """At most ``count`` texts that have each place from one of two texts of the same length, without those.

    >>> crossings((1, 2), (1, 3), random.Random(0), 9)
    []
    """
    found: dict[Body, None] = {}
    for _ in range(count):
        found[tuple(a if a == b or draws.random() < 0.5 else b for a, b in zip(one, two, strict=True))] = None
    return [mixed for mixed in found if mixed not in (one, two)]


def transplants(one: Body, two: Body) -> list[Body]:
    """The first text with each stretch of the second (two places or more) put over it, at every place it fits.

    >>> transplants((1, 2, 3), (4, 5, 6))
    [(4, 5, 3), (1, 4, 5), (5, 6, 3), (1, 5, 6), (4, 5, 6)]
    """
    found: dict[Body, None] = {}
    for width in range(2, len(two) + 1):
        for start in range(len(two) - width + 1):
            for into in range(len(one) - width + 1):
                found[one[:into] + two[start : start + width] + one[into + width :]] = None
    found.pop(one, None)
    return list(found)
