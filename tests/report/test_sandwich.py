"""Between chance and bound: what the sandwich and the picture over noise contain, and what counts as a violation."""

import itertools
from dataclasses import replace

import pytest
from scipy.special import ndtri

from dpguard.policy.gaussian import success_bound
from dpguard.report import figures
from dpguard.report.frontier import frontier
from dpguard.report.result import StudyResult
from dpguard.report.sandwich_content import over_noise_content, sandwich_content, violations
from dpguard.report.sizes import own_sizes, sizes
from dpguard.report.views import policy_views
from dpguard.study.record import Cell, Record
from tests.report.made_up_study import CHANCES, POLICIES, SIGMAS, sample


@pytest.fixture(scope="module")
def table():
    return frontier(sample(20))


def test_every_policy_stands_between_its_chance_and_its_bound(table):
    first, exact = sandwich_content(table).panels
    assert (first.metric, exact.name) == ("rougeL", "exact match")
    assert [part.policy for part in first.slices] == list(POLICIES)
    parts = {part.policy: part for part in first.slices}
    assert parts["dp-sgd noise=0.6"].chance == pytest.approx(0.95 * CHANCES["rougeL"])
    assert parts["dp-sgd noise=0.6"].bound == pytest.approx(success_bound(CHANCES["rougeL"], 1 / 0.6))
    assert parts["dp-sgd noise=0.6"].measured == table.row("dp-sgd noise=0.6").leakage
    assert parts["prune"].bound is None
    assert parts["sign"].measured is None
    assert not any(part.broken for part in (*first.slices, *exact.slices))
    assert violations(table) == []


def with_kappa(study, policy, **kappa):
    return replace(study, records=[
        replace(r, result={**r.result, "kappa": kappa}) if (r.cell.leg, r.cell.policy) == ("guarantee", policy) else r
        for r in study.records
    ])  # fmt: skip


def test_any_metric_above_its_bound_is_a_violation_with_its_corrected_limit():
    study = with_kappa(sample(50), "dp-sgd noise=0.3", rouge1={"value": 0.1, "upper": 0.11, "bound": 0.2})
    [found] = violations(frontier(study))
    assert (found.policy, found.metric, found.bound, found.n) == ("dp-sgd noise=0.3", "rouge1", 0.2, 50)
    assert 0.2 < found.proven < frontier(study).row("dp-sgd noise=0.3").measures["rouge1"].measured.low
    near = with_kappa(sample(50), "dp-sgd noise=0.3", rouge1={"value": 0.1, "upper": 0.11, "bound": 0.5})
    assert violations(frontier(near)) == []


def test_the_curve_over_noise_goes_through_the_recorded_bounds(table):
    content = over_noise_content(table)
    assert [point.sigma for point in content.points] == sorted(SIGMAS[p] for p in SIGMAS if p != "sign")
    [curve] = content.curves
    for point in content.points:
        assert point.bound == pytest.approx(success_bound(CHANCES["rougeL"], 1 / point.sigma))
    assert curve[0][1] == pytest.approx(content.points[0].bound)
    assert curve[-1][1] == pytest.approx(content.points[-1].bound)
    assert all(a[1] > b[1] for a, b in itertools.pairwise(curve))
    assert content.floor == table.floor.value
    assert over_noise_content(replace(table, rows=table.rows[:2])) is None


def bounded(table, metric="rougeL", **ends):
    """The frontier with other chances and bounds."""
    rows = [
        replace(row, measures={**row.measures, metric: replace(row.measures[metric], **ends)})
        if row.sigma_eff and metric in row.measures else row
        for row in table.rows
    ]  # fmt: skip
    return replace(table, rows=tuple(rows))


def test_a_bound_of_one_is_drawn_over_noise_as_in_the_sandwich(table):
    certain = bounded(table, upper=1.0, bound=1.0)
    [panel] = sandwich_content(certain, ["rougeL"]).panels
    assert {part.bound for part in panel.slices if part.policy in SIGMAS and part.measured} == {1.0}
    content = over_noise_content(certain)
    [curve] = content.curves
    assert (curve[0][0], curve[-1][0]) == (content.points[0].sigma, content.points[-1].sigma)
    assert {level for _, level in curve} == {1.0}
    ax = figures.over_noise(certain)
    assert "the most that the guarantee allows" in [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert [line.get_gid() for line in ax.lines].count("bound") == 1


def test_a_bound_of_one_at_little_noise_is_on_the_line_through_the_others(table):
    less = [replace(row, sigma_eff=0.01, measures={
        "rougeL": replace(row.measures["rougeL"], bound=success_bound(CHANCES["rougeL"], 100))
    }) if row.policy == "dp-sgd noise=0.3" else row for row in table.rows]  # fmt: skip
    assert len(over_noise_content(replace(table, rows=tuple(less))).curves) == 1


def test_the_floor_over_noise_is_named_where_nothing_runs_through_its_name(table):
    for narrow in (False, True):
        ax = figures.over_noise(table, narrow=narrow)
        assert not [text for text in ax.texts if "floor" in text.get_text()]
        assert "floor: a guess, no message" in [text.get_text() for text in ax.figure.legends[0].get_texts()]


def leak(policy, scores, *, seed=0, messages=None, **settings):
    rows = [{"target": t, "attack": a, "metrics": {"rougeL": v, "exact_match": float(v == 1)}} for a, t, v in scores]
    cell = Cell("leakage", policy, [{"layers": "all"}], {}, {}, {"at": "start", **settings}, seed)
    result = {"scores": rows, "messages": messages} if messages else {"scores": rows}
    return Record(cell, "done", result=result)


def promised(policy, **result):
    return Record(Cell("guarantee", policy, [{"layers": "all"}], {}, {}, {}), "done", result={"epsilon": 3.0, **result})


def batches(policy, level):
    """Five messages of four texts, as a run of a study leaves them: message after message, each attack in turn."""
    return leak(policy, [
        (attack, 4 * message + n, value)
        for message in range(5)
        for attack, value in (("prior", 0.1), ("span", level[message]))
        for n in range(4)
    ], messages=5)  # fmt: skip


def test_messages_of_several_texts_are_the_units():
    found = frontier(StudyResult({}, [batches("none", [1, 1, 0, 0, 1])])).row("none")
    assert (found.leakage.value, found.leakage.n, found.leakage.texts) == (0.6, 5, 20)
    alone = leak("none", [("span", t, float(t % 5 < 3)) for t in range(20)])
    single = frontier(StudyResult({}, [alone])).row("none").leakage
    assert (single.value, single.n) == (0.6, 20)
    assert found.leakage.high - found.leakage.low > single.high - single.low


def test_several_guesses_in_one_message_raise_chance_and_bound():
    kappa = {"exact_match": {"value": 0.0005, "upper": 0.001, "bound": success_bound(0.001, 1.0)}}
    records = [batches("dp", [0, 0, 0, 0, 0]), promised("dp", kappa=kappa, sigma_eff=1.0)]
    found = frontier(StudyResult({}, records)).row("dp").measures["exact_match"]
    assert found.upper == pytest.approx(0.004)
    assert found.bound == pytest.approx(success_bound(0.004, 1.0))
    assert ndtri(found.bound) - ndtri(found.upper) == pytest.approx(1.0)


@pytest.mark.parametrize(("texts", "few"), [(800, ", where an estimate wants 10,000 or more"), (12_000, "")])
def test_the_measured_chance_is_told_from_the_example(texts, few):
    kappa = {
        "exact_match": {"value": 0.0, "upper": 0.001, "texts": texts, "bound": 0.02},
        "rougeL": {"value": 0.1, "upper": 0.12, "texts": texts, "bound": 0.4},
    }
    promise = promised("dp", kappa=kappa, bound={"kappa": 0.01, "success": 0.08})
    records = [leak("dp", [("prior", 0, 0.1), ("span", 0, 0.2)]), promise]
    study = StudyResult({}, records)
    [view] = policy_views(study, frontier(study))
    measured = f"ROUGE-L 0.1 (at most 0.12), exact match 0 (at most 0.001), measured on {texts:,} public texts{few}"
    assert view.guarantee == (
        ("chance of the best guess without a message", measured),
        (
            "the most that any attack reaches in the mean from one message, given that chance",
            "ROUGE-L 0.4, exact match 0.02",
        ),
        ("bound on exact recovery from one message", "0.08 (for example, where a guess succeeds with chance 0.01)"),
    )


def test_a_chance_from_records_that_do_not_say_on_how_many_texts_says_that():
    kappa = {"rougeL": {"value": 0.1, "upper": 0.12, "bound": 0.4}}
    promise = promised("dp", kappa=kappa, bound={"kappa": 0.01, "success": 0.08})
    study = StudyResult({}, [leak("dp", [("prior", 0, 0.1), ("span", 0, 0.2)]), promise])
    [view] = policy_views(study, frontier(study))
    told = dict(view.guarantee)["chance of the best guess without a message"]
    assert told == "ROUGE-L 0.1 (at most 0.12), measured on a number of public texts that is not on record"


def test_rows_with_other_sizes_and_floors_say_so():
    plain = leak("none", [(a, t, v) for a, v in (("prior", 0.1), ("span", 0.9)) for t in range(12)])
    table = frontier(
        StudyResult({}, [plain, batches("mean", [0.5] * 5), replace(plain, cell=replace(plain.cell, policy="same"))])
    )
    assert sizes(table) == "leakage: 12 targets, 1 seed"
    assert own_sizes(table) == {"mean": "20 targets in 5 messages"}
    less = leak("less", [(a, t, v) for a, v in (("prior", 0.3), ("span", 0.9)) for t in range(12)])
    other = frontier(StudyResult({}, [plain, less]))
    assert own_sizes(other)["less"].startswith("floor 0.30 (")


def test_in_the_closed_world_exact_match_is_identification():
    scores = [(a, t, float(a == "likelihood" and t < 30)) for a in ("prior", "likelihood") for t in range(40)]
    kappa = {
        "exact_match": {"value": 0.0, "upper": 0.001, "bound": 0.01},
        "rougeL": {"value": 0.1, "upper": 0.1, "bound": 0.2},
    }
    pairs = [{"kappa": 1e-4, "success": 0.5}, {"kappa": 0.01, "success": 0.9}]
    promise = promised("dp", kappa=kappa, bounds=pairs, bound=pairs[1])
    records = [leak("dp", scores, threat={"candidates": 100}), promise]
    table = frontier(StudyResult({}, records))
    exact = table.row("dp").measures["exact_match"]
    assert (exact.chance, exact.bound, exact.measured.value) == (0.01, 0.9, 0.75)
    assert table.row("dp").measures["rougeL"].bound is None
    facts = dict(policy_views(StudyResult({}, records), table)[0].guarantee)
    where = "a guess among 100 texts succeeds with chance 0.01"
    assert facts == {"bound on exact recovery from one message": f"0.9 ({where})"}
    assert violations(table) == []
    assert [panel.name for panel in sandwich_content(table).panels] == ["ROUGE-L", "identified among 100"]


def test_drawn_bands_and_bars_are_the_content(table):
    ax = figures.sandwich(table, metric="exact_match")
    lines = {line.get_gid(): line for line in ax.lines}
    [panel] = sandwich_content(table, ["exact_match"]).panels
    for part in panel.slices:
        if part.measured:
            assert tuple(lines[f"measured-{part.number}"].get_xdata()) == (part.measured.low, part.measured.high)
        assert (f"bound-{part.number}" in lines) == (part.bound is not None)
        if part.bound is not None:
            assert set(lines[f"bound-{part.number}"].get_xdata()) == {part.bound}
            assert set(lines[f"chance-{part.number}"].get_xdata()) == {part.chance}
    noise = figures.over_noise(table)
    drawn = {line.get_gid(): line for line in noise.lines}
    for point in over_noise_content(table).points:
        assert tuple(drawn[f"measured-{point.number}"].get_ydata()) == (point.measured.low, point.measured.high)
