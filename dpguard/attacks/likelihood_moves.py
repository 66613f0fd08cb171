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
