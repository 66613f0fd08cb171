"""Labels do not cover each other, points, or the edge, as long as there is room."""

import itertools

import numpy as np
import pytest

from dpguard.report.label_columns import tangles
from dpguard.report.labels import _cross, place, strays


def boxes(places, sizes):
    return [(p.x, p.y, p.x + w, p.y + h) for p, (w, h) in zip(places, sizes, strict=True)]


def meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("seed", range(6))
def test_labels_keep_off_each_other_and_off_points(seed):
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.uniform((60, 40), (640, 360), size=(13, 2))]
    sizes = [(float(w), 12.0) for w in rng.uniform(30, 130, size=13)]
    markers = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    found = boxes(place(points, sizes, bounds=(0, 0, 700, 400), hard=markers), sizes)
    assert not any(meet(a, b) for a, b in itertools.combinations(found, 2))
    assert not any(meet(a, marker) for a in found for marker in markers)
    assert all(a[0] >= 0 and a[2] <= 700 and a[1] >= 0 and a[3] <= 400 for a in found)


def test_a_cluster_spreads_out():
    points = [(350.0 + n, 200.0 + n) for n in range(5)]
    sizes = [(90.0, 12.0)] * 5
    found = boxes(place(points, sizes, bounds=(0, 0, 700, 400)), sizes)
    assert not any(meet(a, b) for a, b in itertools.combinations(found, 2))


def test_placing_is_deterministic_and_empty_is_fine():
    points, sizes = [(50.0, 50.0), (55.0, 52.0)], [(40.0, 10.0)] * 2
    assert place(points, sizes, bounds=(0, 0, 99, 99)) == place(points, sizes, bounds=(0, 0, 99, 99))
    assert place([], [], bounds=(0, 0, 1, 1)) == []


def test_a_label_keeps_nearer_to_its_own_point_than_to_others_where_there_is_room():
    points = [(50.0, 50.0), (50.0, 66.0), (50.0, 82.0)]
    sizes = [(60.0, 10.0)] * 3
    spots = place(points, sizes, bounds=(-200, -200, 300, 300), hard=[(x - 4, y - 4, x + 4, y + 4) for x, y in points])
    for own, (spot, size) in enumerate(zip(spots, sizes, strict=True)):
        assert not strays([np.array([spot.x, spot.y, spot.x + size[0], spot.y + size[1]])], own, points)[0]


@pytest.mark.parametrize("seed", [11, 23, 52, 64, 67, 100])
def test_lines_to_a_stack_of_points_do_not_cross(seed):
    """Stacks in which places taken label by label leave lines that cross."""
    rng = np.random.default_rng(seed)
    points = [(350.0, 100 + float(y)) for y in np.cumsum(rng.uniform(8, 24, 6))]
    sizes = [(float(w), 12.0) for w in rng.uniform(60, 150, 6)]
    markers = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    bars = [(x - 60, y - 1, x + 260, y + 1) for x, y in points]
    spots = place(points, sizes, bounds=(0, 0, 700, 400), hard=markers, soft=bars)
    found = [np.array(box) for box in boxes(spots, sizes)]
    for i, j in itertools.combinations(range(6), 2):
        assert not _cross(points[i], found[i], points[j], found[j])
    assert not any(meet(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("seed", range(8))
def test_ten_names_beside_one_stack_at_the_edge_stand_in_the_points_order(seed):
    """Defences that leak everything: all on the ceiling, with bars on one side and no room on the other."""
    rng = np.random.default_rng(seed)
    points = [(660.0, 120 + float(y)) for y in np.cumsum(rng.uniform(0, 18, 10))]
    sizes = [(float(w), 12.0) for w in rng.uniform(60, 150, 10)]
    markers = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    bars = [(x - 350, y - 1, x + 5, y + 1) for x, y in points]
    spots = place(points, sizes, bounds=(0, 0, 690, 400), hard=markers, soft=bars)
    found = [np.array(box) for box in boxes(spots, sizes)]
    assert tangles(found, points, range(10)) == 0
    assert not any(meet(a, b) for a, b in itertools.combinations(found, 2))
    assert all(box[2] <= 690 for box in found)
