"""Studies that look for a value: run, resumed and interrupted they measure the same values, each once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dpguard.cli import searching
from dpguard.cli.planning import Planned
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.federation.settings import Settings
from dpguard.policy.auto import read_auto
from dpguard.report.frontier import frontier
from dpguard.report.result import StudyResult
from dpguard.study.execution import failed, perform
from dpguard.study.interrupts import INTERRUPTED
from dpguard.study.journal import FINISHED, SEARCHING, Journal
from dpguard.study.lock import in_use
from dpguard.study.runner import run
from dpguard.study.search import chosen, searches
from dpguard.study.spec import SHARED, Study
from dpguard.study.store import Store

TEXT = """\
name: found
model: demo
data: demo
policies:
  first: {rows: [{layers: head, share: false}]}
  dp: {sweep: {noise: {auto: {leakage: 0.3}, between: [0.01, 5]}}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
  last: {rows: [{layers: pooler, share: false}]}
leakage: {targets: 2, seeds: [0, 1]}
utility: {epochs: 1, batch_size: 50}
"""
EXECUTE = f"{Path(__file__).parent / 'fake_search.py'}:execute"
EXPECTED = [0.01, 5.0, 0.2236, 1.057, 0.4862, 0.7169, 0.5904, 0.5358]


def read(text=TEXT):
    return Study.read(Document.parse(text, "study.yaml"))


def go(kit, folder, text=TEXT, fail="", most=None, options=None):
    """Run with fake cells; ``most`` stops the run after so many rounds, as a killed driver would."""
    study = read(text)
    rounds = []

    def plan(found):
        if rounds:  # a run killed here has not finished
            assert Journal.read(folder).ended == SEARCHING
        return Planned(found, found.cells(kit.model, kit.data), {}, {})

    def once(planned, store, first):
        assert in_use(folder)
        if most is not None and len(rounds) >= most:
            raise KeyboardInterrupt
        rounds.append(len(planned.cells))
        context = {"log": str(folder) + ".log", "fail": fail}
        return run(
            planned.study, folder, planned.cells, execute=EXECUTE, context=context, workers=2, quiet=True, held=store,
            **(options or {}),
        )  # fmt: skip

    return searching.run(study, folder, plan, once)


def tried(folder, variable="noise"):
    with Store.open(folder) as store:
        sweeps = store.study().spec["sweeps"]
    return [sweep["values"][variable] for sweep in sweeps.values()]


def contents(folder):
    with Store.open(folder) as store:
        return store.study(), [(r.cell, r.status, r.reason, r.result) for r in store.records()]


def test_values_are_measured_one_after_the_other_until_the_target_is_bracketed(kit, tmp_path):
    settled, summary = go(kit, tmp_path / "out")
    assert sorted(tried(tmp_path / "out")) == sorted(EXPECTED)
    assert [named.label for named in settled.study.policies] == [
        "none", "first", *(f"dp noise={value:g}" for value in sorted(EXPECTED)), "last",
    ]  # fmt: skip
    # every value is an ordinary policy: a guarantee, two leakage cells and a training
    assert summary.planned == summary.done == 4 * (len(EXPECTED) + 3)
    assert settled.sentences == (
        "dp: noise for leakage 0.3: noise=0.5358 (leakage 0.287) keeps it, noise=0.4862 (leakage 0.306) does not; "
        "all 8 values are spent",
    )
    starts = Counter(line.split()[0] for line in Path(f"{tmp_path / 'out'}.log").read_text().splitlines())
    assert set(starts.values()) == {1}
    assert Journal.read(tmp_path / "out").ended == FINISHED


def test_the_measured_leakage_is_the_reports(kit, tmp_path):
    settled, _ = go(kit, tmp_path)
    with Store.open(tmp_path) as store:
        found = frontier(StudyResult.read(store))
    assert {row.policy for row in found.rows} == {named.label for named in settled.study.policies}
    for row in found.rows:
        assert row.leakage is not None
        if f"{row.policy.removeprefix('dp ')} (leakage" in settled.sentences[0]:
            assert f"{row.policy.removeprefix('dp ')} (leakage {row.leakage.value:.3g})" in settled.sentences[0]
    assert sum(f"{row.policy.removeprefix('dp ')} (" in settled.sentences[0] for row in found.rows) == 2


@pytest.mark.parametrize("most", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_records(kit, tmp_path, most):
    with pytest.raises(KeyboardInterrupt):
        go(kit, tmp_path / "out", most=most)
    _, summary = go(kit, tmp_path / "out")
    assert summary.planned == summary.resumed + summary.done
    go(kit, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    starts = Counter(line.split()[0] for line in Path(f"{tmp_path / 'out'}.log").read_text().splitlines())
    assert set(starts.values()) == {1}
    _, summary = go(kit, tmp_path / "out")
    assert (summary.done, summary.resumed) == (0, summary.planned)


def test_a_target_utility(kit, tmp_path):
    text = TEXT.replace("leakage: 0.3}", "utility: 0.7}").replace("between: [0.01, 5]", "between: [0.1, 5], values: 5")
    settled, _ = go(kit, tmp_path, text)
    assert len(tried(tmp_path)) == 5
    assert "(utility 0." in settled.sentences[0]
    assert "all 5 values are spent" in settled.sentences[0]


def test_one_search_for_each_choice_of_the_other_variables(kit, tmp_path):
    text = TEXT.replace("sweep: {", "sweep: {clip: [1, 2], ").replace("clip: 1.0", "clip: $clip")
    settled, _ = go(kit, tmp_path, text)
    assert [sentence.split(":")[0] for sentence in settled.sentences] == ["dp clip=1", "dp clip=2"]
    with Store.open(tmp_path) as store:
        values = [sweep["values"] for sweep in store.study().spec["sweeps"].values()]
    assert sorted(v["noise"] for v in values if v["clip"] == 1) == sorted(v["noise"] for v in values if v["clip"] == 2)


class Inline:
    """Runs the cells in this process, all that it was given before any answer is seen."""

    places = 100

    def __init__(self, log, meddle):
        self.context, self.meddle, self.given = {"log": log}, meddle, []

    def takes(self, cell):
        return True

    def start(self, cell):
        self.given.append(cell)

    def wait(self, wake, timeout=None):
        cells, self.given = self.given, []
        return self.meddle([perform(cell, EXECUTE, self.context) for cell in cells])

    def close(self):
        pass


def test_ctrl_c_starts_no_other_value_although_all_that_ran_has_ended(kit, tmp_path):
    pressed = []

    def press(answers):
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return answers

    inline = {"executor": lambda: Inline(str(tmp_path / "inline.log"), press)}
    _, summary = go(kit, tmp_path / "out", options=inline)
    assert summary.exit_status == INTERRUPTED
    assert summary.done == summary.planned == 4 * 5
    assert tried(tmp_path / "out") == [0.01, 5.0]
    assert "all 20 cells planned so far are finished; run the same command again" in summary.sentence
    _, summary = go(kit, tmp_path / "out", options=inline)
    assert (summary.exit_status, summary.resumed, summary.done) == (0, 4 * 5, 4 * (len(EXPECTED) - 2))
    assert sorted(tried(tmp_path / "out")) == sorted(EXPECTED)


def test_a_cell_that_was_ended_from_outside_in_one_round_and_done_in_the_next_counts_once(kit, tmp_path):
    lost = []

    def lose(answers):
        if not lost:
            lost.append(answers[0][0].cell)
            answers[0] = failed(lost[0], "killed", "worker ended with signal 9")
        return answers

    _, summary = go(kit, tmp_path / "out", options={"executor": lambda: Inline(str(tmp_path / "inline.log"), lose)})
    assert (summary.failed, summary.resumed, summary.exit_status) == (0, 0, 0)
    assert summary.done == summary.planned == 4 * (len(EXPECTED) + 3)


def test_a_failed_cell_ends_its_search_and_nothing_else(kit, tmp_path):
    settled, summary = go(kit, tmp_path, fail="leakage at start, dp noise=0.2236, seed 1")
    assert summary.failed == 1
    assert settled.sentences == (
        "dp: noise for leakage 0.3: it ends at noise=0.2236, which gave no leakage: ValueError: a deliberate failure",
    )
    assert summary.exit_status == 1


def test_a_target_outside_of_the_range_goes_on_with_the_ends(kit, tmp_path):
    settled, summary = go(kit, tmp_path, TEXT.replace("0.3}, between: [0.01, 5]", "0.3}, between: [0.01, 0.1]"))
    assert "no end of the range keeps it" in settled.sentences[0]
    assert (len(tried(tmp_path)), summary.exit_status) == (2, 0)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("leakage: {targets: 2, seeds: [0, 1]}\n", "", "6:30: auto: nothing measures leakage, expected a 'leakage'"),
        ("between: [0.01, 5]", "between: [5, 0.01]", "6:55: between is [5, 0.01]; expected two numbers above 0"),
        ("noise: {auto", "nois: {auto", "sweep variable 'nois' is used by no row"),
        (", between: [0.01, 5]", "", "6:23: sweep 'noise' has no 'between'"),
        ("{leakage: 0.3}", "{leakage: 0.3, epsilon: 3}", "expected one target, such as {leakage: 0.3}"),
        ("auto: {leakage: 0.3}, between: [0.01, 5]}}", "auto: {epsilon: 3}}}, epsilon: 2",
         "epsilon is set beside a sweep that looks for one"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_meant_has_its_place(old, new, sentence):
    assert old in TEXT
    with pytest.raises(UserError) as error:
        read(TEXT.replace(old, new))
    assert str(error.value).startswith("study.yaml:6:")
    assert sentence in str(error.value)


def test_a_study_with_a_target_epsilon_has_no_cells_before_it_is_computed(kit):
    study = read(TEXT.replace("leakage: 0.3}, between: [0.01, 5]", "epsilon: 3}"))
    assert [named.label for named in study.policies] == ["none", "first", "dp noise=auto", "last"]
    with pytest.raises(ValueError, match="not calibrated"):
        study.cells(kit.model, kit.data)
    assert not replace(study).policies[2].values


def test_what_is_a_whole_number_in_a_federation_is_looked_for_among_whole_numbers():
    whole = {field.name for field in fields(Settings) if field.type == "int"} - set(SHARED)
    assert {"clients", "may_fail", "rounds"} <= whole
    for name in whole:
        assert read_auto("n", {"auto": {"leakage": 0.3}, "between": [2, 40]}, {name}).whole, name


def test_one_tried_value_can_be_named_again(kit):
    study = chosen(read(), ["dp noise=0.4862", "last"])
    assert "dp noise=0.4862" in [named.label for named in study.policies]
    assert searches(study) == []
    assert "dp noise=0.5" not in [named.label for named in chosen(read(), ["dp  noise=0.5"]).policies]
