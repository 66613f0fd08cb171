"""Places labels beside points so that nothing overlaps, as far as that can be had. Pure geometry, in pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dpguard.report.label_columns import crossing, in_columns, nearest

Boxes = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

RINGS = (10.0, 16.0, 26.0, 40.0, 58.0, 80.0, 110.0)
ANGLES = tuple(math.radians(a) for a in (0, 180, 35, -35, 145, -145, 90, -90, 65, -65, 115, -115))
SWEEPS = 4
STRAY = 30.0
"""Cost of a place that is nearer to the point of another label."""
MEETING = 30.0
"""Cost of a pixel that is covered of another label."""
FENCED, IN_COLUMN = 2.0, 0.15
"""Cost of a pixel of a line that a label covers, and the part of it that counts where lines would be tangled."""
CROSSED = 30.0
"""What it may cost that two lines from points to labels do not cross."""


@dataclass(frozen=True)
class Place:
    """Where a label goes.

    Attributes:
        x: its left edge.
        y: its lower edge.
        distance: from the point, to decide whether a leader line is needed.
    """

    x: float
    y: float
    distance: float


def overlap(box: NDArray[np.float64], others: Boxes) -> NDArray[np.float64]:
    """Area that one box (left, bottom, right, top) shares with each of the others, shape (others,)."""
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    area: NDArray[np.float64] = np.clip(width, 0, None) * np.clip(height, 0, None)
    return area


def covered(box: Box, obstacles: Sequence[Box]) -> float:
    """Area of a box that obstacles cover.

    >>> covered((0, 0, 2, 1), [(1, 0, 5, 5)])
    1.0
    """
    return float(overlap(np.array(box), np.array(obstacles).reshape(-1, 4)).sum())


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    bounds: Box,
    hard: Sequence[Box] = (),
    soft: Sequence[Box] = (),
) -> list[Place]:
    """Choose a place for each label: near its point, inside the bounds, off other labels and obstacles.

    Every label in turn takes the cheapest of a ring of places, given where the others are, in a few sweeps. Then labels
    whose lines to their points cross are exchanged where that is no worse otherwise, and what is still tangled beside a
    stack of points goes into a column (`label_columns`).

    Args:
        points: the labelled points.
        sizes: width and height of each label.
        bounds: left, bottom, right, top of the area to stay in.
        hard: boxes that no label may cover (markers).
        soft: boxes that a label had better not cover (interval bars, lines).

    >>> [spot] = place([(50, 50)], [(20, 10)], bounds=(0, 0, 100, 100))
    >>> (spot.x, spot.y)
    (60.0, 45.0)
    """
    walls = np.array(list(hard) or np.empty((0, 4)), dtype=np.float64).reshape(-1, 4)
    fences = np.array(list(soft) or np.empty((0, 4)), dtype=np.float64).reshape(-1, 4)
    choices = [_choices(point, size) for point, size in zip(points, sizes, strict=True)]
    standing = [
        np.array([_fixed_cost(box, distance, bounds, walls, fences) for box, distance in options])
        + STRAY * strays([box for box, _ in options], number, points)
        for number, options in enumerate(choices)
    ]
    chosen: list[int | None] = [None] * len(choices)
    for _ in range(SWEEPS):
        before = list(chosen)
        for number, options in enumerate(choices):
            placed = [choices[i][c][0] for i, c in enumerate(chosen) if c is not None and i != number]
            others = np.array(placed).reshape(-1, 4)
            crossing = np.array([MEETING * overlap(_padded(box), others).sum() for box, _ in options])
            chosen[number] = int(np.argmin(standing[number] + crossing))
        if chosen == before:
            break
    picked = [options[c or 0] for options, c in zip(choices, chosen, strict=True)]

    def cost(number: int, box: NDArray[np.float64], others: Boxes, fenced: float = FENCED) -> float:
        own = _fixed_cost(box, _away(points[number], box), bounds, walls, fences, fenced)
        return own + MEETING * float(overlap(_padded(box), others).sum())

    settled = in_columns(
        _untangled([box for box, _ in picked], points, cost), points, partial(cost, fenced=FENCED * IN_COLUMN)
    )
    return [Place(float(box[0]), float(box[1]), _away(point, box)) for point, box in zip(points, settled, strict=True)]


def _untangled(
    boxes: list[NDArray[np.float64]],
    points: Sequence[tuple[float, float]],
    cost: Callable[[int, NDArray[np.float64], Boxes], float],
) -> list[NDArray[np.float64]]:
    """The boxes, with those exchanged whose lines to their points cross, where that costs little."""
    for i, j in combinations(range(len(boxes)), 2):
        if not _cross(points[i], boxes[i], points[j], boxes[j]):
            continue
        mine, theirs = _instead(boxes[i], boxes[j], points[i]), _instead(boxes[j], boxes[i], points[j])
        rest = [box for k, box in enumerate(boxes) if k not in (i, j)]
        now = cost(i, boxes[i], _stack(rest, boxes[j])) + cost(j, boxes[j], _stack(rest, boxes[i]))
        after = cost(i, mine, _stack(rest, theirs)) + cost(j, theirs, _stack(rest, mine))
        if after <= now + CROSSED and not _cross(points[i], mine, points[j], theirs):
            boxes[i], boxes[j] = mine, theirs
    return boxes


def _stack(boxes: Sequence[NDArray[np.float64]], last: NDArray[np.float64]) -> Boxes:
    stacked: Boxes = np.array([*boxes, last]).reshape(-1, 4)
    return stacked


def _instead(own: NDArray[np.float64], other: NDArray[np.float64], point: tuple[float, float]) -> NDArray[np.float64]:
    """A box of the first one's size where the second one is, with the edge that is nearer to a point."""
    width, height = own[2] - own[0], own[3] - own[1]
    left = other[0] if point[0] <= (other[0] + other[2]) / 2 else other[2] - width
    return np.array([left, other[1], left + width, other[1] + height])


def _away(point: tuple[float, float], box: NDArray[np.float64]) -> float:
    return math.dist(point, nearest(point, box))


def _cross(
    one: tuple[float, float], its: NDArray[np.float64], two: tuple[float, float], others: NDArray[np.float64]
) -> bool:
    """Whether the lines from two points to their boxes cross."""
    return crossing((one, nearest(one, its)), (two, nearest(two, others)))


def strays(boxes: Sequence[NDArray[np.float64]], own: int, points: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Which boxes stand nearer to another point than to their own, or as near.

    >>> strays([np.array([60.0, 45, 80, 55])], 0, [(50, 50), (85, 50)]).tolist()
    [True]
    """
    edges, at = np.array(boxes)[:, None, :], np.array(points)[None]
    out = np.maximum(np.maximum(edges[..., :2] - at, at - edges[..., 2:]), 0)
    away = np.hypot(out[..., 0], out[..., 1])
    others = np.delete(away, own, axis=1)
    others = others[:, np.hypot(*(np.delete(np.array(points), own, axis=0) - points[own]).T) > 1]  # not those below it
    found: NDArray[np.bool_] = others.min(axis=1, initial=np.inf) <= away[:, own]
    return found


def _choices(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[NDArray[np.float64], float]]:
    """Boxes around a point whose nearest edge is on a ring, nearest ring first."""
    (x, y), (width, height) = point, size
    found = []
    for ring in RINGS:
        for angle in ANGLES:
            dx, dy = math.cos(angle), math.sin(angle)
            centre = (x + ring * dx + width / 2 * _side(dx), y + ring * dy + height / 2 * _side(dy))
            left, bottom = centre[0] - width / 2, centre[1] - height / 2
            found.append((np.array([left, bottom, left + width, bottom + height]), ring))
    return found


def _side(cosine: float) -> float:
    return 0.0 if abs(cosine) < 0.3 else math.copysign(1.0, cosine)


def _padded(box: NDArray[np.float64]) -> NDArray[np.float64]:
    padded: NDArray[np.float64] = box + np.array([-2.0, -1.0, 2.0, 1.0])
    return padded


def _fixed_cost(
    box: NDArray[np.float64],
    distance: float,
    bounds: Box,
    walls: Boxes,
    fences: Boxes,
    fenced: float = FENCED,
) -> float:
    left, bottom, right, top = bounds
    outside = max(left - box[0], 0) + max(bottom - box[1], 0) + max(box[2] - right, 0) + max(box[3] - top, 0)
    return float(
        100 * outside + 20 * overlap(_padded(box), walls).sum() + fenced * overlap(box, fences).sum() + 1.2 * distance
    )
