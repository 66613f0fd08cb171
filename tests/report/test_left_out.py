"""A report made with ``--only`` says that it is not the whole study, and how it was made."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest

from dpguard.cli.planning import Planned
from dpguard.cli.studies import _only
from dpguard.documents import Document
from dpguard.report.again import left_out, reproduce
from dpguard.report.render import render
from dpguard.report.result import StudyResult
from dpguard.study.merge import merge
from dpguard.study.spec import Study
from dpguard.study.store import Store
from tests.report.made_up_study import POLICIES, sample

TEXT = """\
name: which-layers
question: Does it help?
model: demo
data: demo
policies:
  dp-sgd: {sweep: {noise: [0.3, 0.6]}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
  last-block:
leakage: {targets: 3}
utility: {epochs: 2, batch_size: 50}
"""
MODEL = {"name": "m", "hash": "1"}
DATA = {"name": "d", "hash": "2", "train": 1000, "test": 100}


def planned():
    study = Study.read(Document.parse(TEXT, "study.yaml"))
    return Planned(study, study.cells(MODEL, DATA), {}, {})


def with_spec(study, **spec):
    return replace(study, study={**study.study, "spec": {**study.spec, **spec}})


def some(policies, **spec):
    """The made-up study where only these policies were asked for."""
    study = sample(8)
    kept = [record for record in study.records if record.cell.policy in policies]
    others = [policy for policy in POLICIES if policy not in policies]
    return with_spec(replace(study, records=kept), policies=list(policies), left_out=others, **spec)


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text("utf-8")))


def test_the_plan_of_some_policies_keeps_the_names_of_the_others():
    whole = planned()
    part = _only(whole, ["dp-sgd noise=0.6"])
    assert part.study.plain()["left_out"] == ["dp-sgd noise=0.3", "last-block"]
    assert part.study.plain()["policies"] == ["none", "dp-sgd noise=0.6"]
    assert [cell.id for cell in part.cells] == [c.id for c in whole.cells if c.policy in ("none", "dp-sgd noise=0.6")]
    every = _only(whole, ["dp-sgd noise=0.3", "dp-sgd noise=0.6", "last-block"])
    assert "left_out" not in whole.study.plain()
    assert every.study.plain() == whole.study.plain()


def test_a_store_from_before_is_read_and_goes_on(tmp_path):
    """Its study does not say what was left out; that it is the same study does not depend on it."""
    part = _only(planned(), ["last-block"])
    now = part.study.plain()
    before = {key: value for key, value in now.items() if key != "left_out"}
    for name, spec in (("old", before), ("new", now)):
        with Store.open(tmp_path / name, create=True) as store:
            store.set_study("which-layers", TEXT, spec, part.cells)
    with Store.open(tmp_path / "old") as store:
        found = StudyResult.read(store)
        assert (left_out(found), reproduce(found)) == ("", "")
    merge(tmp_path / "out", [tmp_path / "new", tmp_path / "old"])
    with Store.open(tmp_path / "old", create=True) as store:
        store.set_study("which-layers", TEXT, now, part.cells)
        assert left_out(StudyResult.read(store)).startswith("2 of the study's 4 policies were not asked for")


@pytest.mark.parametrize(("caps", "might"), [
    ({"max_leakage": 0.9, "max_epsilon": 20}, "One of them might have been better."),
    ({"max_leakage": 0.01}, "One of them might have qualified."),
    ({}, ""),
])  # fmt: skip
def test_the_first_block_names_what_was_left_out(caps, might, tmp_path):
    page = render(some(["none", "dp-sgd noise=0.6", "prune"], recommend=caps), tmp_path)
    told = (
        "Not the whole study. 10 of the study's 13 policies were not asked for (--only): dp-sgd noise=0.3, "
        "dp-sgd noise=1.0, dp-sgd noise=2.0, clip-only, upper-blocks, no-embeddings and 4 more."
    )
    text = words(page).replace("&#39;", "'")
    assert f"{told} {might}".strip() in text
    assert text.index(told) < text.index("The frontier")
    assert "One of them might" in (tmp_path / "report.md").read_text() or not might
    assert "10 of the study's 13 policies were not asked for" in (tmp_path / "report.md").read_text()


def test_the_command_of_the_report_asks_for_what_it_has(tmp_path):
    render(some(["none", "dp-sgd noise=0.6", "prune"]), tmp_path)
    [command] = re.findall(r"run `(dpguard run sample\.yaml[^`]*)`", (tmp_path / "report.md").read_text())
    asked = shlex.split(command)[3:]
    assert asked == ["--only", "dp-sgd noise=0.6", "--only", "prune", "--out", "again"]
    assert f"{command}</pre>" in (tmp_path / "report.html").read_text().replace("&#39;", "'")
    assert reproduce(some(["none"])) == "--only none --out again"
    assert reproduce(some(["none", "prune`<b>"])) == "--only POLICY --out again"
    render(sample(8), tmp_path)
    assert "run `dpguard run sample.yaml`." in (tmp_path / "report.md").read_text()
    assert "Not the whole study" not in (tmp_path / "report.html").read_text()
