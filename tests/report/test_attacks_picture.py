"""The picture of attacks: whose answers are whose, what is blank and why, and when there is none."""

from dataclasses import replace

import pytest

from dpguard.errors import UserError
from dpguard.report import figures
from dpguard.report.attacks_content import LISTED, attacks_content
from dpguard.report.board import Answer
from dpguard.report.frontier import frontier
from tests.report.made_up_study import sample


def changed(study, policy, change):
    """The study with the scores of one policy's leakage cells changed: a function of one score, None drops it."""
    records = []
    for record in study.records:
        if record.cell.leg == "leakage" and record.cell.policy == policy:
            scores = [new for score in record.result["scores"] if (new := change(score))]
            record = replace(record, result={**record.result, "scores": scores})
        records.append(record)
    return replace(study, records=records)


@pytest.fixture(scope="module")
def study():
    return sample(10)


def test_values_are_the_largest_means_over_positions(study):
    content = attacks_content(frontier(study))
    assert content.attacks == ("prior", "span", "match")
    for record in study.records:
        if record.cell.leg == "leakage" and record.status == "done" and record.cell.policy in content.whole:
            for attack in content.attacks:
                values = [s["metrics"]["rougeL"] for s in record.result["scores"] if s["attack"] == attack]
                assert content.answers[record.cell.policy, attack].value >= sum(values) / len(values) - 1e-9
    largest = frontier(study).row("none").leakage.value
    assert max(content.answers["none", attack].value for attack in content.attacks) == pytest.approx(largest)


def test_what_was_taken_over_is_not_the_attacks_own(study):
    def inherit(score):
        return {**score, "inherited": score["attack"] == "match"}

    table = frontier(changed(study, "clip-only", inherit))
    answer = attacks_content(table).answers["clip-only", "match"]
    assert answer.taken_over == answer.scores == 20
    row = [p for _, p in attacks_content(table).policies].index("clip-only")
    words = [(t.get_text(), t.get_position()) for t in figures.attacks(table).texts]
    assert ("taken over", (2.5, row + 0.5)) in words

    def half(score):
        return {**score, "inherited": score["attack"] == "match" and score["target"] < 3}

    texts = [t.get_text() for t in figures.attacks(frontier(changed(study, "clip-only", half))).texts]
    assert "6 of 20 taken over" in texts


def test_an_attack_that_could_not_run_is_told_from_one_that_found_nothing(study):
    table = frontier(changed(study, "clip-only", lambda score: score if score["attack"] != "match" else None))
    content = attacks_content(table)
    assert ("clip-only", "match") not in content.answers
    assert isinstance(content.answers["clip-only", "span"], Answer)
    texts = [t.get_text() for t in figures.attacks(table).texts]
    assert texts.count("could not run") == 1
    narrow = [t.get_text() for t in figures.attacks(table, narrow=True).texts]
    assert (narrow.count("×"), narrow.count("*")) == (1, 0)
    assert texts.count("not measured") == len(content.attacks) * (len(content.policies) - len(content.whole)) > 0


def test_an_attack_that_could_use_some_messages_only_says_so(study):
    few = changed(study, "clip-only", lambda s: s if s["attack"] != "match" or s["target"] < 2 else None)
    texts = [t.get_text() for t in figures.attacks(frontier(few)).texts]
    assert texts.count("could run on 4 of 20") == 1
    assert [t.get_text() for t in figures.attacks(frontier(few), narrow=True).texts].count("*") == 1


def test_none_with_one_attack_or_too_many_policies(study):
    table = frontier(study)
    assert attacks_content(replace(table, rows=table.rows * 3)) is None
    assert 3 * len(table.rows) > LISTED
    few = replace(table, rows=tuple(replace(row, attacks=("prior", "span")) for row in table.rows))
    assert attacks_content(few) is None
    with pytest.raises(UserError, match="fewer than two attacks"):
        figures.attacks(few)
