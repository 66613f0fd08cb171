"""Labels of points that stand on one another, in a column beside them: in the points' order, so that no lines cross.

Pure geometry, in pixels. Label by label (`labels.place`) the second one of a stack takes the place that the third one
needs; a column is chosen whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, product
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

Box = NDArray[np.float64]
"""Left, bottom, right, top."""
Point = tuple[float, float]
Cost = Callable[[int, Box, NDArray[np.float64]], float]
"""(label, its box, the other boxes) -> what is wrong with it there."""

BESIDE, ABOVE = 12.0, 44.0
"""Points of one stack are no farther from the next one than this, sideways and upwards."""
FEWEST = 3
GAP = 3.0
OFFSETS = tuple(side * away for away in (14.0, 24.0, 40.0, 64.0, 96.0, 140.0, 200.0) for side in (1, -1))
SHIFTS = (0.0, -16.0, 16.0, -32.0, 32.0, -52.0, 52.0, -76.0, 76.0, -104.0, 104.0)
TANGLED = 60.0
"""Cost of a line that crosses another, or runs through the name of another point."""


def in_columns(boxes: Sequence[Box], points: Sequence[Point], cost: Cost) -> list[Box]:
    """The boxes, with a column for every stack of points whose lines are tangled, where that is better.

    Args:
        boxes: where the labels are now.
        points: what they name.
        cost: of one label's place, beside tangles.

    >>> stack = [(50.0, 50.0), (50.0, 52.0), (50.0, 54.0)]
    >>> wrong = [np.array([70.0, y, 90.0, y + 10]) for y in (80.0, 50.0, 20.0)]
    >>> nearer = lambda label, box, others: abs(box[0] - 60) + abs(box[1] - 47)
    >>> [float(box[1]) for box in in_columns(wrong, stack, nearer)]
    [34.0, 47.0, 60.0]
    """
    now = [np.asarray(box) for box in boxes]
    for stack in _stacks(points):
        if not tangles(now, points, stack):
            continue
        tried = [_column(now, points, stack, offset, shift) for offset, shift in product(OFFSETS, SHIFTS)]
        best, least = now, math.inf
        for own, layout in sorted(((_own(b, stack, cost), b) for b in (now, *tried)), key=itemgetter(0)):
            if own >= least:  # a tangle adds to it, and takes longer to find
                break
            total = own + TANGLED * tangles(layout, points, stack)
            if total < least:
                best, least = layout, total
        now = best
    return now


def tangles(boxes: Sequence[Box], points: Sequence[Point], some: Sequence[int]) -> int:
    """How many lines from points to labels cross another one or run through another label; one of the two in ``some``.

    Args:
        boxes: where the labels are.
        points: what they name.
        some: the labels that count.
    """
    lines = [(point, nearest(point, box)) for point, box in zip(points, boxes, strict=True)]
    count = 0
    for i, j in combinations(range(len(boxes)), 2):
        if i in some or j in some:
            count += crossing(lines[i], lines[j]) + _through(lines[i], boxes[j]) + _through(lines[j], boxes[i])
    return count


def nearest(point: Point, box: Box) -> Point:
    """Where a leader line meets a box."""
    left, bottom, right, top = box.tolist()
    return min(max(point[0], left), right), min(max(point[1], bottom), top)


def crossing(one: tuple[Point, Point], two: tuple[Point, Point]) -> bool:
    """Whether two lines cross.

    >>> crossing(((0, 0), (2, 2)), ((0, 2), (2, 0))), crossing(((0, 0), (2, 2)), ((1, 0), (3, 2)))
    (True, False)
    """

    def turn(a: Point, b: Point, c: Point) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    return turn(*one, two[0]) * turn(*one, two[1]) < 0 and turn(*two, one[0]) * turn(*two, one[1]) < 0


def _through(line: tuple[Point, Point], box: Box) -> bool:
    """Whether a line has a point inside a box (Liang and Barsky 1984: the part of it within every edge)."""
    (x, y), (far, high) = line
    enters, leaves = 0.0, 1.0
    for start, step, low, top in ((x, far - x, box[0], box[2]), (y, high - y, box[1], box[3])):
        if step == 0:
            if not low < start < top:
                return False
            continue
        ends = sorted(((low - start) / step, (top - start) / step))
        enters, leaves = max(enters, ends[0]), min(leaves, ends[1])
    return bool(enters < leaves)


def _own(boxes: Sequence[Box], stack: Sequence[int], cost: Cost) -> float:
    everything = np.array(boxes)
    return sum(cost(i, boxes[i], np.delete(everything, i, axis=0)) for i in stack)


def _stacks(points: Sequence[Point]) -> list[list[int]]:
    """Groups of points of which each is near the next one, from the lowest to the highest; small ones left out."""
    left = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    found = []
    while left:
        group, new = [], [left.pop(0)]
        while new:
            group += new
            near = {
                j for i in new for j in left
                if abs(points[i][0] - points[j][0]) <= BESIDE and abs(points[i][1] - points[j][1]) <= ABOVE
            }  # fmt: skip
            new = [j for j in left if j in near]
            left = [j for j in left if j not in near]
        if len(group) >= FEWEST:
            found.append(sorted(group, key=lambda i: (points[i][1], points[i][0])))
    return found


def _column(
    boxes: Sequence[Box], points: Sequence[Point], stack: Sequence[int], offset: float, shift: float
) -> list[Box]:
    """The stack's labels beside it, each as near to the height of its point as the others let it."""
    out = list(boxes)
    side = math.copysign(1.0, offset)
    edge = max(side * points[i][0] for i in stack) * side + offset
    heights = [boxes[i][3] - boxes[i][1] for i in stack]
    for i, height, middle in zip(
        stack, heights, _spread([points[i][1] for i in stack], max(heights) + GAP), strict=True
    ):
        width, bottom = boxes[i][2] - boxes[i][0], middle + shift - height / 2
        left = edge if side > 0 else edge - width
        out[i] = np.array([left, bottom, left + width, bottom + height])
    return out


def _spread(at: Sequence[float], gap: float) -> list[float]:
    """The nearest places (least squares) in the same order at least ``gap`` apart, by pooling adjacent violators.

    >>> _spread([0, 0, 30], 10)
    [-5.0, 5.0, 30.0]
    """
    pools: list[tuple[float, int]] = []
    for index, place in enumerate(at):
        pools.append((place - index * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, m), (two, n) = pools[-2:]
            pools[-2:] = [((one * m + two * n) / (m + n), m + n)]
    flat = [mean for mean, count in pools for _ in range(count)]
    return [float(mean + index * gap) for index, mean in enumerate(flat)]
