"""Paired differences, and what a report says of what it lacks."""

from dataclasses import replace

import pytest

from dpguard.report.differences import compared, differences
from dpguard.report.frontier import frontier
from dpguard.report.missing import missing
from dpguard.report.recommend import recommend
from tests.report.made_up_study import POLICIES, sample

CAPS = {"max_leakage": 0.4, "min_utility": 0.7, "max_epsilon": 20}


@pytest.fixture(scope="module")
def study():
    return sample(30)


@pytest.fixture(scope="module")
def table(study):
    return frontier(study)


def test_every_measured_policy_is_compared_with_the_recommended_one_and_with_none(study, table):
    chosen = recommend(table, **CAPS).policy
    first, second = compared(study, table, chosen)
    assert (first.reference, second.reference) == (chosen, "none")
    assert {row.policy for row in first.rows} == set(POLICIES) - {chosen}
    assert [found.reference for found in compared(study, table, "none")] == ["none"]
    for row in second.rows:
        assert table.rows[row.number - 1].policy == row.policy
        mine = table.row(row.policy)
        if mine.leakage:
            assert row.leakage.value == pytest.approx(mine.leakage.value - table.ceiling.leakage.value)
            assert row.leakage.low <= row.leakage.value <= row.leakage.high
            assert row.leakage.n == 30
        if mine.utility:
            assert row.utility.value == pytest.approx(mine.utility.value - table.ceiling.utility.value)
            assert row.utility.n == 400


def test_a_pair_is_told_apart_where_its_two_intervals_overlap(study, table):
    one, two = table.row("none"), table.row("clip-only")
    assert one.utility.low < two.utility.high
    [row] = [row for row in differences(study, table, "clip-only").rows if row.policy == "none"]
    width = row.utility.high - row.utility.low
    assert width < 0.7 * (one.utility.high - one.utility.low)


def test_legs_that_are_missing_have_no_difference(study, table):
    rows = {row.policy: row for row in differences(study, table, "none").rows}
    assert rows["sign"].leakage is None
    assert rows["sign"].utility is not None
    assert rows["no-embeddings"].utility is None


def test_what_is_missing_is_said_with_what_it_means(study, table):
    decision = recommend(table, **CAPS)
    found = missing(table, decision)
    assert found.results == 1
    assert [group.leg for group in found.broken] == ["leakage"]
    assert [group.leg for group in found.skipped] == ["utility"]
    assert found.meaning[0] == "Not considered in the decision: no-embeddings, sign."
    assert found.meaning[1].startswith(f"{decision.policy} keeps every cap whatever these would have given")
    none = recommend(table, max_leakage=0.0, min_utility=0.9)
    assert missing(table, none).meaning[-1] == "One of them might have qualified."


def test_without_the_control_nothing_can_be_concluded(study):
    kept = [r for r in study.records if (r.cell.policy, r.cell.leg) != ("none", "leakage")]
    table = frontier(replace(study, records=kept))
    [line] = missing(table, recommend(table, **CAPS)).meaning
    assert line == "The undefended control is among them, so nothing can be concluded about any policy."


def test_nothing_is_said_where_nothing_is_missing(study):
    whole = [r for r in study.records if r.cell.policy not in ("sign", "no-embeddings")]
    spec = {**study.spec, "policies": [name for name in POLICIES if name not in ("sign", "no-embeddings")]}
    table = frontier(replace(study, study={**study.study, "spec": spec}, records=whole))
    found = missing(table, recommend(table, **CAPS))
    assert (found.results, found.broken, found.skipped, found.meaning) == (0, (), (), ())
