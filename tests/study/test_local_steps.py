"""``threat.local_steps``: what one message of several noised steps is worth to who holds it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from dpguard.documents import Document
from dpguard.inputs.family import slots
from dpguard.policy import gaussian
from dpguard.policy.table import Policy
from dpguard.study import guarantee_leg
from dpguard.study.record import Cell
from dpguard.study.spec import Study
from tests import tiny

STUDY = """\
name: s
model: demo
data: demo
policies: {dp: {rows: [{layers: all, clip: 1, noise: 2}]}}
leakage: {targets: 2, threat: {local_steps: 5}}
"""
DATA = {"name": "d", "hash": "2", "train": 1000, "test": 100}


def promised(cell, rows):
    plan = Policy(rows).plan(slots(tiny.module("bert")))
    return guarantee_leg._promised(cell, plan, SimpleNamespace())


def cells(text):
    study = Study.read(Document.parse(text, "study.yaml"))
    return [c for c in study.cells({"name": "m", "hash": "1"}, DATA, None) if c.leg == "guarantee" and c.policy == "dp"]


def test_five_noised_steps_on_one_text_are_five_looks_at_it():
    [cell] = cells(STUDY)
    found, seen, _ = promised(cell, cell.table)
    assert (found.steps, seen) == (5, 5)
    assert found.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(5) / 2, found.delta), rel=1e-3)
    assert found.bound(0.01, seen) == pytest.approx(gaussian.success_bound(0.01, math.sqrt(5) / 2), rel=1e-6)


def test_one_step_and_a_change_clipped_as_a_whole_are_one_look():
    [gradient] = cells(STUDY.replace("local_steps: 5", "local_steps: 0"))
    [one] = cells(STUDY.replace("local_steps: 5", "local_steps: 1"))
    assert promised(one, one.table)[1] == promised(gradient, gradient.table)[1] == 1
    [cell] = cells(STUDY)
    whole = [{**cell.table[0], "unit": "update"}]
    found, seen, _ = promised(cell, whole)
    assert (found.steps, seen) == (1, 1)


def test_a_training_counts_its_own_steps_and_the_bound_those_of_the_message():
    [cell] = cells(STUDY + "utility: {epochs: 2, batch_size: 50}\n")
    found, seen, _ = promised(cell, cell.table)
    assert (found.steps, seen) == (40, 5)
    assert isinstance(cell, Cell)
