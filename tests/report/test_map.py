"""The map: which policies belong to it, where, and what its cells say."""

import pytest

from dpguard.errors import UserError
from dpguard.policy.ready import ready
from dpguard.report import figures
from dpguard.report.board import Frontier, Row
from dpguard.report.map_content import map_content
from dpguard.report.pictures import draw_all
from dpguard.stats import Interval

NOTHING = {"layers": "all", "train": False, "share": False}
PARTS = ("embeddings", "block[0]", "block[1]", "block[2]", "pooler", "head")


def shown(*policies, leakage=0.5):
    """A frontier of policies, each (name, rows)."""
    rows = [
        Row(
            name, leakage=Interval(leakage, 0.4, 0.6, 9), utility=Interval(0.7, 0.6, 0.8, 99), shared_fraction=0.01,
            table=tuple(table),
        )
        for name, table in policies
    ]  # fmt: skip
    return Frontier(tuple(rows), "rougeL", "accuracy", parts=PARTS)


def places(*policies):
    found = map_content(shown(*policies))
    return {} if found is None else {place: cell.policy for place, cell in found.cells.items()}


def only(selector):
    return (str(selector), ready(selector).rows if isinstance(selector, str) else ready("head-only").rows)


def test_one_selector_of_one_block_and_role_has_its_place():
    names = ["block[0].attention.query", "block[-1].mlp.in", "block[1]", "block[2].norms", "head", "embeddings"]
    assert places(*(only(name) for name in names)) == {
        ("block 0", "attention.query"): "block[0].attention.query",
        ("block 2", "mlp.in"): "block[-1].mlp.in",
        ("block 1", "whole"): "block[1]",
        ("block 2", "norms"): "block[2].norms",
        ("head", "whole"): "head",
        ("embeddings", "whole"): "embeddings",
    }


def test_several_ways_to_write_the_same_part_mean_the_same():
    union = [{"layers": "all", "train": False, "share": False},
             {"layers": [f"block[1].attention.{part}" for part in ("query", "key", "value", "qkv", "output")],
              "train": True, "share": True}]  # fmt: skip
    others = ["embeddings", "block[0]", "block[2:]", "pooler", "head", "norms"]
    slices = [{"layers": others, "train": False, "share": False},
              {"layers": "block[1].norms", "train": True, "share": True}]  # fmt: skip
    assert places(("union", union), ("slices", slices)) == {
        ("block 1", "attention"): "union",
        ("block 1", "whole"): "slices",
    }


@pytest.mark.parametrize(
    "table",
    [
        [],
        [{"layers": "all", "clip": 1.0}],
        [{"layers": "embeddings", "share": False, "train": False}],
        [{"layers": "all", "train": False, "share": False}, {"layers": "block[*].mlp", "train": True, "share": True}],
        [
            {"layers": "all", "train": False, "share": False},
            {"layers": "block[0]", "train": True, "share": True, "bits": 8},
        ],
        [{"layers": "all", "train": False, "share": False}, {"layers": "name:*", "train": True, "share": True}],
        [{"layers": "all", "train": False, "share": False}, {"layers": "head.bias", "train": True, "share": True}],
        [{"layers": "all", "train": False, "share": False}, {"layers": "block[0]", "share": True}],
        [
            {"layers": "all", "train": False, "share": False},
            {"layers": ["block[0]", "head"], "train": True, "share": True},
        ],
    ],
)
def test_what_shares_more_or_changes_it_has_no_place(table):
    found = places(only("block[1]"), only("head"), ("odd", table))
    assert set(found.values()) == {"block[1]", "head"}


def test_utility_counts_only_where_nothing_else_trains():
    shared = [{"layers": "all", "share": False}, {"layers": "block[0].mlp.in", "share": True}]
    content = map_content(shown(("shared", shared), only("block[0].mlp.out")))
    assert content.cells["block 0", "mlp.in"].utility is None
    assert content.cells["block 0", "mlp.out"].utility.value == 0.7


def test_places_without_a_record_are_places_and_are_drawn_as_such():
    content = map_content(shown(only("block[0].mlp.in"), only("block[1].mlp.out"), only("head")))
    assert content.rows == ("block 0", "block 1", "block 2", "head")
    assert content.columns == ("whole", "mlp.in", "mlp.out")
    assert len(content.places) == 3 * 3 + 1
    ax = figures.map(shown(only("block[0].mlp.in"), only("block[1].mlp.out"), only("head")))
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("no record") == len(content.places) - 3
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == texts.count("no record")
    assert texts.count("0.50") == texts.count("1.0 %") == 3


def test_the_worst_of_two_for_one_place_stands_there():
    one, two = shown(only("head"), only("block[0]")), shown(("worse", only("head")[1]), leakage=0.9)
    both = Frontier((*one.rows, *two.rows), "rougeL", "accuracy", parts=PARTS)
    assert map_content(both).cells["head", "whole"].policy in ("head", "worse")
    worse = Row("worse", leakage=Interval(0.9, 0.8, 1.0, 9), table=two.rows[0].table)
    assert (
        map_content(Frontier((*one.rows, worse), "rougeL", "accuracy", parts=PARTS)).cells["head", "whole"].policy
        == "worse"
    )


def test_no_map_without_cells():
    assert map_content(shown(only("head"))) is None
    with pytest.raises(UserError, match="fewer than 2 policies share a single part"):
        figures.map(shown(only("head")))


def placed(name, at, attacks=("prior", "span")):
    leakage = Interval(max(at.values()), 0.4, 1.0, 9)
    return Row(name, leakage=leakage, leakage_at=at, attacks=attacks, table=tuple(only(name)[1]), shared_fraction=0.01)


def values(ax):
    return sorted(text.get_text() for text in ax.texts if text.get_text() not in ("no record", "1.0 %"))


def test_every_position_in_the_training_has_a_map_of_its_own():
    rows = placed("block[0]", {"start": 0.9, "tuned": 0.2}), placed("head", {"start": 0.3, "tuned": 0.7})
    table = Frontier(rows, "rougeL", "accuracy", parts=PARTS)
    assert map_content(table).positions == ("start", "tuned")
    assert values(figures.map(table, at="start")) == ["0.30", "0.90"]
    assert values(figures.map(table, at="tuned")) == ["0.20", "0.70"]
    assert values(figures.map(table)) == ["0.70", "0.90"]
    drawn = draw_all(table)
    assert [name for name in drawn if name.startswith("map")] == ["map", "map_tuned"]
    assert "fine-tuned weights" in drawn["map_tuned"].axes.get_title(loc="left")
    with pytest.raises(UserError, match="at is 'tined'; did you mean 'tuned'"):
        figures.map(table, at="tined")


def test_one_position_is_one_map():
    rows = placed("block[0]", {"end": 0.9}), placed("head", {"end": 0.3})
    drawn = draw_all(Frontier(rows, "rougeL", "accuracy", parts=PARTS))
    assert [name for name in drawn if name.startswith("map")] == ["map"]
    assert drawn["map"].axes.get_title(loc="left") == "ROUGE-L when just that is shared"


def test_a_guess_is_no_leak_of_the_part():
    rows = placed("block[0]", {"start": 0.9}), placed("block[2]", {"start": 0.15}, attacks=("prior",))
    ax = figures.map(Frontier(rows, "rougeL", "accuracy", parts=PARTS))
    assert "no attack\ncould run" in values(ax)
    assert "0.15" not in values(ax)
