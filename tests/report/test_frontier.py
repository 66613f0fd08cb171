"""Records to rows: the largest mean over attacks, nothing averaged over survivors, every gap named."""

import csv
import io
import math
from dataclasses import replace

import pytest

from dpguard.errors import UserError
from dpguard.report.frontier import COLUMNS, Row, frontier, mark_front
from dpguard.report.result import StudyResult
from dpguard.stats import Interval
from dpguard.study.record import TextRow
from dpguard.study.store import Store
from tests.report.made_up_study import POLICIES, sample


@pytest.fixture(scope="module")
def study():
    return sample(20)


@pytest.fixture(scope="module")
def table(study):
    return frontier(study)


def without(study, keep):
    return replace(study, records=[record for record in study.records if keep(record)])


def test_policies_keep_the_order_of_the_study(study, table):
    assert [row.policy for row in table.rows] == list(POLICIES)
    assert frontier(replace(study, records=study.records[::-1])) == table


def test_leakage_is_the_largest_mean_over_attacks_and_positions(study, table):
    row = table.row("prune")
    means = {}
    for record in study.records:
        if record.cell.policy == "prune" and record.cell.leg == "leakage":
            for score in record.result["scores"]:
                key = (score["attack"], record.result["at"])
                means.setdefault(key, []).append(score["metrics"]["rougeL"])
    means = {key: sum(values) / len(values) for key, values in means.items()}
    assert row.leakage.value == pytest.approx(max(means.values()))
    assert (row.attack, row.at) == max(means, key=means.get)
    assert row.leakage.low < row.leakage.value < row.leakage.high
    assert row.leakage.n == 20


def test_utility_is_the_mean_of_the_seeds(study, table):
    cells = [r for r in study.records if r.cell.policy == "mixture" and r.cell.leg == "utility"]
    mean = sum(cell.result["metrics"]["accuracy"] for cell in cells) / 3
    assert table.row("mixture").utility.value == pytest.approx(mean)
    assert table.row("mixture").utility.seeds == 3


def test_floor_ceiling_and_commonest_class(table):
    assert table.ceiling.policy == "none"
    assert table.ceiling.leakage.value == 1.0
    assert 0.05 < table.floor.value < 0.2
    assert table.majority == pytest.approx(0.555, abs=0.01)


def test_in_a_federation_the_commonest_class_is_each_clients_own_where_that_is_more(study):
    def federated(record, own):
        if record.cell.leg != "utility" or record.status != "done":
            return record
        return replace(record, result={**record.result, "federation": {"commonest": own}})

    for own, found, by_client in ((0.75, 0.75, True), (0.1, pytest.approx(0.555, abs=0.01), False)):
        records = [federated(record, own) for record in study.records]
        table = frontier(replace(study, records=records))
        assert (table.majority, table.by_client) == (found, by_client)


def test_a_failed_cell_takes_its_leg_from_the_policy_and_is_named(table):
    row = table.row("sign")
    assert row.leakage is None
    assert row.utility is not None
    [gap] = row.gaps
    assert (gap.leg, gap.status, gap.where) == ("leakage", "failed", "end, seed 0")
    assert "out of memory" in gap.reason
    assert not row.on_front


def test_skipped_utility_keeps_its_reason(table):
    row = table.row("no-embeddings")
    assert row.utility is None
    assert row.leakage is not None
    assert {gap.status for gap in row.gaps} == {"skipped"}
    assert len(row.gaps) == 3


def test_a_cell_that_never_ran_is_missing(study):
    def keep(record):
        return not (record.cell.policy == "prune" and record.cell.leg == "utility" and record.cell.seed == 2)

    [gap] = frontier(without(study, keep)).row("prune").gaps
    assert (gap.leg, gap.status, gap.where) == ("utility", "missing", "seed 2")


def test_a_planned_cell_that_ran_for_nobody_is_missing(study):
    planned = [record.cell for record in study.records]
    result = replace(without(study, lambda r: not (r.cell.leg == "utility" and r.cell.seed == 2)), planned=planned)
    table = frontier(result)
    assert all(row.utility is None for row in table.rows)
    assert [(gap.leg, gap.where) for gap in table.row("prune").gaps] == [("utility", "seed 2")]


def test_a_policy_without_any_record_is_listed(study):
    spec = {**study.spec, "policies": [*study.spec["policies"], "forgotten"]}
    row = frontier(replace(study, study={**study.study, "spec": spec})).row("forgotten")
    assert row.gaps[0].status == "missing"
    assert (row.leakage, row.utility, row.epsilon) == (None, None, None)


def test_a_measurement_above_its_bound_is_seen_and_chance_is_not(study, table):
    assert not any(row.broken for row in table.rows)
    found = table.row("dp-sgd noise=0.3").measures["exact_match"]
    assert found.proven is None
    found = replace(found, proven=study.scores.proven("dp-sgd noise=0.3", "exact_match"))
    assert 0 < found.proven < found.measured.low
    assert replace(found, bound=found.proven - 0.001).broken
    assert not replace(found, bound=found.proven + 0.001).broken
    assert not replace(found, bound=None).broken
    assert table.row("none").measures["exact_match"].proven is None


def test_front_is_what_no_other_policy_beats():
    def row(name, leakage, utility):
        return Row(name, leakage=Interval(leakage, 0, 1, 1), utility=Interval(utility, 0, 1, 1))

    rows = [row("a", 0.1, 0.5), row("b", 0.2, 0.9), row("c", 0.3, 0.8), row("d", 0.1, 0.4), row("e", 0.2, 0.9)]
    marked = mark_front([*rows, Row("f")])
    assert [r.policy for r in marked if r.on_front] == ["a", "b", "e"]


def test_csv_has_exactly_the_columns_that_others_build_on(table):
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[0] == COLUMNS
    assert len(COLUMNS) == 12
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert by_name["none"]["epsilon"] == "inf"
    assert by_name["no-embeddings"]["utility"] == ""
    assert by_name["dp-sgd noise=0.6"]["epsilon"] == "6.31"
    assert by_name["none"]["on_front"] == "True"
    assert by_name["sign"]["leakage"] == ""


def test_frame_is_typed(table):
    frame = table.to_frame()
    assert frame["epsilon"].dtype == float
    assert math.isinf(frame.set_index("policy").loc["none", "epsilon"])
    assert frame["on_front"].dtype == bool


def test_another_metric_can_be_asked_for(study, table):
    exact = frontier(study, metric="exact_match")
    assert exact.leakage_metric == "exact_match"
    assert exact.row("prune").leakage.value == table.row("prune").exact.value
    entities = frontier(study, metric="entity_recall").row("none").leakage
    assert entities.n < 20


def test_unknown_metrics_are_sentences(study):
    with pytest.raises(UserError, match="did you mean 'rougeL'"):
        frontier(study, metric="rougel")
    with pytest.raises(UserError, match="'loss'; expected one of: accuracy, f1, mcc"):
        frontier(study, utility_metric="loss")


def test_a_study_without_records_is_a_table_of_gaps():
    table = frontier(StudyResult({"spec": {"policies": ["none", "dp-sgd"]}}, []))
    assert [row.policy for row in table.rows] == ["none", "dp-sgd"]
    assert all(row.gaps for row in table.rows)
    assert table.floor is None


def test_a_study_without_a_utility_leg_has_no_gap_for_it(study):
    table = frontier(without(study, lambda record: record.cell.leg != "utility"))
    assert table.row("prune").utility is None
    assert table.row("prune").gaps == ()


def test_texts_are_not_read_unless_they_may_be_shown(study, tmp_path):
    cell = next(r.cell for r in study.records if r.cell.leg == "leakage")
    with Store.open(tmp_path, create=True) as store:
        spec = {"question": "Why?", "data": {"path": "mine.jsonl"}, "policies": [cell.policy]}
        store.set_study("s", "name: s", spec, [cell])
        store.put(next(r for r in study.records if r.cell is cell), [TextRow(0, "truth", "a secret")])
        hidden = StudyResult.read(store)
        store.set_study("s", "name: s", spec, [cell], show_text=True)
        shown = StudyResult.read(store)
        store.set_study("s", "name: s", {**spec, "data": {"path": "demo"}}, [cell])
        bundled = StudyResult.read(store)
    assert hidden.study["question"] == "Why?"
    assert (dict(hidden.texts), hidden.shows_text) == ({}, False)
    assert shown.texts[cell.id][0].text == "a secret"
    assert (shown.synthetic, bundled.synthetic, bundled.shows_text) == (False, True, True)
    assert frontier(hidden).row(cell.policy).leakage is not None


def test_every_planned_cell_of_a_policy_that_has_not_run_is_missing():
    study = sample(3)
    cells = [record.cell for record in study.records]
    left = [record for record in study.records if record.cell.policy != "prune"]
    lost = len(cells) - len(left)
    assert lost > 1
    for planned in (cells, ()):
        row = frontier(replace(study, records=left, planned=planned)).row("prune")
        assert len(row.gaps) == lost
        assert {gap.status for gap in row.gaps} == {"missing"}
