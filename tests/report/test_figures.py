"""What the pictures contain, and that drawing shows exactly that."""

import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.figure import Figure

from dpguard.errors import UserError
from dpguard.report import figures
from dpguard.report.figure_content import LABELLED, LISTED, leakage_content, tradeoff_content
from dpguard.report.frontier import Frontier, Row, frontier, mark_front
from dpguard.report.style import BANDS, band
from dpguard.report.svg import Mark, inline, to_svg
from dpguard.stats import Interval
from dpguard.study.store import Store
from tests.report.made_up_study import POLICIES, sample


@pytest.fixture(scope="module")
def table():
    return frontier(sample(20))


def many(count):
    rows = [
        Row(
            f"p{n}",
            leakage=Interval(n / count, 0, 1, 9),
            utility=Interval(0.5 + (n % 7) / 20, 0.4, 1, 9),
            epsilon=2.0,
        )
        for n in range(count)
    ]
    return Frontier(tuple(mark_front(rows)), "rougeL", "accuracy", Interval(0.1, 0.05, 0.2, 9))


def test_tradeoff_holds_every_policy_or_says_why_not(table):
    content = tradeoff_content(table)
    drawn = {point.policy for point in content.points}
    absent = dict(content.absent)
    assert drawn | set(absent) == set(POLICIES)
    assert set(absent) == {"sign", "no-embeddings"}
    assert "out of memory" in absent["sign"]
    assert "federation" in absent["no-embeddings"]


def test_tradeoff_numbers_are_rows_of_the_table(table):
    for point in tradeoff_content(table).points:
        row = table.rows[point.number - 1]
        assert (row.policy, row.leakage, row.utility) == (point.policy, point.leakage, point.utility)


def test_tradeoff_lines(table):
    content = tradeoff_content(table)
    assert content.floor == table.floor.value
    assert content.ceiling == table.row("none").leakage.value
    assert content.undefended == table.row("none").utility.value
    assert list(content.front) == sorted(content.front)
    assert all(a[1] < b[1] for a, b in itertools.pairwise(content.front))


def test_shape_and_colour_say_what_is_guaranteed(table):
    bands = {point.policy: point.band for point in tradeoff_content(table).points}
    assert bands["none"] is None
    assert bands["dp-sgd noise=2.0"] is BANDS[0]
    assert bands["dp-sgd noise=0.3"] is BANDS[3]
    assert band(3.0) is BANDS[1]
    ax = figures.tradeoff(table)
    markers = {line.get_gid(): line.get_marker() for line in ax.lines if str(line.get_gid()).startswith("point-")}
    assert markers["point-1"] == "D"
    assert markers["point-3"] == "o"
    assert len(markers) == len(tradeoff_content(table).points)


def test_drawn_points_and_bars_are_the_content(table):
    ax = figures.tradeoff(table)
    lines = {line.get_gid(): line for line in ax.lines}
    for point in tradeoff_content(table).points:
        drawn = lines[f"point-{point.number}"].get_xydata()[0]
        assert drawn == pytest.approx((point.leakage.value, point.utility.value))
        bar = lines[f"bar-{point.number}"].get_xdata()
        assert tuple(bar) == (point.leakage.low, point.leakage.high)


def placed(*policies):
    rows = [
        Row(name, leakage=Interval(x, 0, 1, 9), utility=Interval(y, 0.4, 0.9, 9), epsilon=epsilon)
        for name, x, y, epsilon in policies
    ]
    return Frontier(tuple(rows), "rougeL", "accuracy")


def test_a_point_under_another_shows_as_a_ring_around_it():
    """A hollow diamond under a circle could not be seen at all."""
    inf = float("inf")
    table = placed(("bare", 0.2, 0.7, inf), ("apart", 0.8, 0.7, inf), ("weak", 0.2, 0.701, 20.0), ("dp", 0.2, 0.7, 1.0))
    content = tradeoff_content(table)
    assert [point.under for point in content.points] == [2, 0, 1, 0]
    assert content.stacked
    drawn = {line.get_gid(): line for line in figures.tradeoff(table).lines}
    bare, apart, weak, dp = (drawn[f"point-{number}"] for number in (1, 2, 3, 4))
    assert bare.get_markersize() > weak.get_markersize() + 2 > dp.get_markersize() + 4
    assert bare.get_zorder() < weak.get_zorder() < dp.get_zorder()
    assert apart.get_markersize() < dp.get_markersize()
    assert not tradeoff_content(placed(("a", 0.2, 0.7, 1.0), ("b", 0.21, 0.7, 1.0), ("c", 0.2, 0.72, inf))).stacked
    crowd = placed(*((f"p{n}", 0.2, 0.7, 1.0) for n in range(LABELLED + 1)))
    assert not tradeoff_content(crowd).stacked


def test_names_do_not_cover_each_other(table):
    ax = figures.tradeoff(table)
    ax.figure.draw_without_rendering()
    names = set(POLICIES) | {"no defence", "always the commonest class"}
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text() in names]
    assert len(boxes) == 13
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_crowded_picture_names_the_front_only():
    table = many(LABELLED + 10)
    content = tradeoff_content(table)
    assert len(content.points) == LABELLED + 10
    assert {p.policy for p in content.points if p.labelled} == {r.policy for r in table.rows if r.on_front}
    figures.tradeoff(table)
    twins = replace(table, rows=tuple(replace(row, policy=f"{row.policy}{n}") for row in table.rows for n in "ab"))
    named = [(p.leakage.value, p.utility.value) for p in tradeoff_content(twins).points if p.labelled]
    assert 0 < len(named) == len(set(named)) <= LABELLED


def test_leakage_chart_lists_all_or_says_how_many_are_left_out(table):
    content = leakage_content(table)
    assert [bar.policy for bar in content.bars] == list(POLICIES)
    assert content.left_out == 0
    crowd = leakage_content(many(LISTED + 5))
    assert len(crowd.bars) + crowd.left_out == LISTED + 5
    assert crowd.left_out > 0


def test_drawing_works_on_given_axes_and_without_points(table):
    figure = Figure()
    ax = figure.subplots()
    assert figures.tradeoff(table, ax=ax) is ax
    empty = Frontier((Row("none"),), "rougeL", "accuracy")
    figures.tradeoff(empty)
    ax = figures.leakage(empty)
    assert "not measured" in [text.get_text() for text in ax.texts]


def test_the_users_own_style_changes_nothing(table):
    plain = to_svg(figures.figure_of(figures.tradeoff(table)))
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.facecolor": "red"}):
        assert to_svg(figures.figure_of(figures.tradeoff(table))) == plain


def test_svg_files_have_no_date_and_real_text(table):
    svg = to_svg(figures.figure_of(figures.tradeoff(table)))
    root = ET.fromstring(svg)
    assert "dp-sgd noise=0.6" in "".join(root.itertext())
    assert not re.search(r"20\d\d-\d\d-\d\d|Matplotlib v", svg)


def test_hostile_names_are_text_in_the_picture():
    names = ["$\\frac{1}{0}$", "<script>x</script>", "a\u202eb\x07", "患者" * 40, "&amp;"]
    rows = [
        Row(name, leakage=Interval(n / 5, 0, 1, 9), utility=Interval(0.5, 0.4, 1, 9), epsilon=1.0)
        for n, name in enumerate(names)
    ]
    table = Frontier(tuple(rows), "rougeL", "accuracy")
    root = ET.fromstring(to_svg(figures.figure_of(figures.tradeoff(table))))
    shown = "".join(root.itertext())
    assert "$\\frac{1}{0}$" in shown
    assert "<script>" in shown
    assert "a[U+202E]b[U+0007]" in shown
    assert not [e for e in root.iter() if e.tag.endswith("script")]


def test_inline_svg_takes_the_colours_of_the_page_and_links_its_points(table):
    svg = to_svg(figures.figure_of(figures.tradeoff(table)))
    mark = Mark("#policy-1", 'none: <leaks> "all"', 1)
    part = inline(svg, prefix="x-", title="T", css_class="wide", marks={"point-1": mark})
    root = ET.fromstring(part)
    link = root.find(".//{http://www.w3.org/2000/svg}a")
    assert link.get("href") == "#policy-1"
    assert link.find("{http://www.w3.org/2000/svg}title").text == 'none: <leaks> "all"'
    assert "var(--ink)" in part
    assert "#1c2430" not in part
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("x-") for name in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", part)) <= set(ids)
    with pytest.raises(KeyError, match="point-99"):
        inline(svg, prefix="x-", title="T", css_class="wide", marks={"point-99": mark})


def test_figures_are_drawn_from_a_folder_records_a_result_or_a_frontier(tmp_path):
    study = sample(6)
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "name: s", {**study.spec, "recommend": {}}, [record.cell for record in study.records])
        for record in study.records:
            store.put(record)
    for source in (tmp_path, str(tmp_path), study.records, study, frontier(study)):
        drawn = figures.tradeoff(source, metric="exact_match")
        assert "exact match" in drawn.get_xlabel()
        assert sum(str(line.get_gid()).startswith("point-") for line in drawn.lines) == 11
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        figures.leakage(frontier(study), metric="exact_mach")
    with pytest.raises(UserError, match="fewer than two noise levels"):
        figures.over_noise([record for record in study.records if record.cell.policy == "none"])


@pytest.mark.parametrize("name", ["tradeoff", "leakage", "sandwich", "over_noise", "map"])
def test_every_figure_draws_onto_axes_of_the_users_and_leaves_their_figure_alone(table, name):
    figure = Figure(layout="constrained")
    ax, other = figure.subplots(1, 2)
    assert getattr(figures, name)(table, ax=ax) is ax
    assert figure.get_layout_engine() is not None
    assert not figure.legends
    assert not other.has_data()
    assert ax.has_data()


@pytest.mark.parametrize("kind", figures.FORMATS)
def test_a_saved_figure_is_the_same_bytes_again(table, kind, tmp_path):
    for name in ("one", "two"):
        figures.save(figures.sandwich(table), tmp_path / f"{name}.{kind}")
    found = (tmp_path / f"one.{kind}").read_bytes()
    assert found == (tmp_path / f"two.{kind}").read_bytes()
    assert not re.search(rb"CreationDate|dc:date", found)


def test_figures_have_three_formats(table, tmp_path):
    with pytest.raises(UserError, match="cannot be written as 'gif'; expected one of: svg, png, pdf"):
        figures.save(figures.leakage(table), tmp_path / "x.gif")
