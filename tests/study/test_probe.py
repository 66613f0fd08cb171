"""The estimate of a dry run: parts that grow are scaled up, parts that do not are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpguard.study.executor import Limits
from dpguard.study.probe import Estimate, chosen, estimate, short, whole
from dpguard.study.record import Record
from dpguard.study.workers import Workers, warm_up


def one(kit, leg, **wanted):
    return next(
        c for c in kit.cells() if c.leg == leg and all(c.settings.get(name) == value for name, value in wanted.items())
    )


def test_a_probe_is_the_cell_made_short(kit):
    attack = short(one(kit, "leakage", at="end"))
    assert (attack.settings["targets"], attack.settings["at"], "needs" in attack.settings) == (1, "start", False)
    training = short(one(kit, "utility"))
    assert training.settings["epochs"] == pytest.approx(3 * 50 / 1000)
    assert short(one(kit, "guarantee")) == one(kit, "guarantee")
    large = replace(training, settings={**one(kit, "utility").settings, "batch_size": 500})
    assert [short(large, texts).settings["batch_size"] for texts in (64, 16)] == [64, 16]
    assert short(large).settings["epochs"] == pytest.approx(3 * 64 / 1000)


def test_what_grows_is_scaled_up(kit):
    attack = one(kit, "leakage")
    scores = [
        {"attack": "span", "seconds": 2.0, "inherited": False},
        {"attack": "match", "seconds": 9.0, "inherited": True},
    ]
    record = Record(short(attack), "done", result={"scores": scores}, provenance={"seconds": 5.0})
    assert whole(attack, record) == 3.0 + 3 * 2.0
    # three texts in a message, and each message at three rounds
    rounds = replace(attack, settings={**attack.settings, "at": "rounds", "observe": [1, 15, 30], "batch_size": 3})
    record = replace(record, result={"scores": [{**score, "target": text} for text in range(3) for score in scores]})
    assert whole(rounds, record) == 3.0 + 3 * 3 * 2.0
    training = one(kit, "utility")
    result = {"train_seconds": 0.6, "steps": 3}
    record = Record(short(training), "done", result=result, provenance={"seconds": 1.0})
    assert whole(training, record) == pytest.approx(0.4 + 40 * 0.2)
    large = replace(training, settings={**training.settings, "batch_size": 500, "epochs": 2})
    record = replace(record, cell=short(large))
    assert whole(large, record) == pytest.approx(0.4 + 4 * 0.2 * 500 / 64)
    # 0.04 s a step and 0.0025 s a text; a second probe that took no less says nothing
    smaller = replace(record, cell=short(large, 16), result={"train_seconds": 0.24, "steps": 3})
    assert whole(large, record, smaller) == pytest.approx(0.4 + 4 * (0.04 + 0.0025 * 500))
    slower = replace(smaller, result={"train_seconds": 0.9, "steps": 3})
    assert whole(large, record, slower) == whole(large, record)


def test_every_kind_is_probed_at_most_twice(kit):
    picked = chosen(kit.cells())
    assert len(picked) == 6  # at the start and at the end are the same probe
    assert {cell.leg for cell in picked} == {"guarantee", "leakage", "utility"}


def test_a_probe_that_fails_is_said(kit):
    warm_up()
    cells = [cell for cell in kit.cells() if cell.leg == "guarantee"]
    context = {"script": {"guarantee, none": "raise"}}
    found = estimate(cells, lambda: Workers(kit.execute, context, 2, limits=Limits(minutes=1)))
    assert (found.probes, found.over, found.unknown) == (2, (), {})
    assert 0 <= found.low <= found.high < 60
    context = {"script": {"guarantee, none": "raise", "guarantee, last-block": "raise"}}
    found = estimate(cells, lambda: Workers(kit.execute, context, 2))
    assert "nothing is known of guarantee: ValueError: a deliberate failure" in found.sentence


def test_an_ended_probe_says_at_least():
    assert (
        " or more (leakage at start: the probe was ended after 30 s)"
        in Estimate(1, 2, 3, ("leakage at start",), {}).sentence
    )


class Late:
    """Trainings with more texts a step than ``most`` are ended at the limit; others take 1 s a step."""

    places = 1

    def __init__(self, most):
        self.most, self.asked = most, []

    def takes(self, cell):
        return True

    def start(self, cell):
        self.cell = cell
        self.asked.append(cell.settings["batch_size"])

    def wait(self, wake, timeout=None):
        if self.cell.settings["batch_size"] > self.most:
            return [(Record(self.cell, "failed", reason="slow", provenance={"failure": "time", "seconds": 30.0}), [])]
        result = {"train_seconds": 3.0, "steps": 3}
        return [(Record(self.cell, "done", result=result, provenance={"seconds": 3.0}), [])]

    def close(self):
        pass


@pytest.mark.parametrize(("most", "over"), [(64, ()), (16, ()), (1, ("utility",))])
def test_large_steps_are_probed_small_and_smaller_where_that_is_too_long(kit, most, over):
    large = replace(one(kit, "utility"), settings={**one(kit, "utility").settings, "batch_size": 500})
    executor = Late(most)
    found = estimate([large], lambda: executor)
    assert found.over == over
    assert set(executor.asked) == {64, 16}
    if not over:  # 4 steps of 500 texts, each as long as 500 / most small ones, as two sizes took the same
        assert found.high == pytest.approx(found.low) == pytest.approx(4 * 500 / most + (3.0 if most == 64 else 30.0))
