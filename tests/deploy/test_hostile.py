"""Every kind of hostile message, on every kind of table: refused, or handled as documented, never passed through."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dpguard.deploy import golden, hostile
from dpguard.deploy.checks import Refused
from dpguard.errors import UserError
from tests.deploy import cases


@pytest.fixture(scope="module")
def vectors():
    return {name: golden.make(cases.rehearsal(name)) for name in cases.TABLES}


@pytest.mark.parametrize("row", hostile.FLEET, ids=lambda row: row.name)
def test_no_hostile_message_passes_any_table(row, vectors, tmp_path):
    found = Counter()
    for number, name in enumerate(cases.TABLES):
        found[hostile.attempt(row, vectors[name], tmp_path / str(number))] += 1
    assert found["refused"] + found["handled"] >= 1, "no table has such a message"
    if row.handled is None:
        assert not found["handled"]


def test_the_fleet_has_thirty_kinds_and_more_and_the_good_message_leaves(vectors):
    assert len({row.name for row in hostile.FLEET}) == len(hostile.FLEET) >= 30  # as docs/deploy.md says
    for name, made in vectors.items():
        sent = hostile.good_leaves(made)
        assert set(sent) == set(made.rehearsal.plan.shared), name


def test_a_gate_that_lets_a_message_pass_is_caught(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("dpguard.deploy.checks.check_difference", lambda *a, **k: None)
    row = next(row for row in hostile.FLEET if row.name.startswith("full weights instead"))
    with pytest.raises(UserError, match="passed through"):
        hostile.attempt(row, vectors["whole update"], tmp_path)


def test_refusals_say_nothing_private(vectors, tmp_path):
    """The sentence goes into logs that a server may read: it holds no number that the update decides."""
    made = vectors["dp-sgd, differences"]
    for scale in (1.0, 3.0):
        spoilt = {n: scale * v for n, v in made.update.items()}
        spoilt[next(iter(spoilt))] = spoilt[next(iter(spoilt))].clone().fill_(torch.nan)
        with pytest.raises(Refused) as refused:
            golden.through_core(golden.replace(made, update=spoilt))
        said = refused.value.sentence
        assert "not finite" in said
        assert said == str(refused.value)
        if scale == 1.0:
            first = said
    assert said == first


def test_a_training_that_diverged_leaves_as_noise_where_the_whole_update_is_noised(vectors, tmp_path):
    """A refusal is seen by the server, and the noise does not cover it."""
    for name, made in vectors.items():
        for row in (row for row in hostile.FLEET if row.name in ("NaN", "infinity")):
            outcome = hostile.attempt(row, made, tmp_path / f"{name} {row.name}")
            assert (outcome == "handled") == name.endswith("whole update"), (name, row.name, outcome)
