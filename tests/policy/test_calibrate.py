from __future__ import annotations

import copy
import subprocess
import sys

import pytest

import dpguard
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny

BERT = slots(tiny.module("bert"))
FACTS = {"delta": 1e-5, "sampling_rate": 0.02, "steps": 500}
PROPORTIONS = [
    {"layers": "all", "clip": 1.0, "noise": 0.5, "per": "block"},
    {"layers": "head", "noise": 2.0},
    {"layers": "embeddings", "train": False},
]


def epsilon(policy, **facts):
    return dpguard.guarantee(policy.plan(BERT), **{**FACTS, **facts}).epsilon


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 300.0])
@pytest.mark.parametrize(
    "rows",
    [
        [{"layers": "all", "clip": 0.3}],
        PROPORTIONS,
        [{"layers": "all", "clip": {"quantile": 0.5, "count_noise": 40}, "noise": 3}],
    ],
)
def test_the_target_is_kept_and_nearly_used_up(rows, target):
    policy = Policy(rows, "mine")
    before = copy.deepcopy(policy.rows)
    found = policy.calibrate(BERT, epsilon=target, **FACTS)
    assert 0.99 * target <= epsilon(found) <= target
    assert policy.rows == before, "the old policy is not touched"
    assert found.name == "mine"


def test_one_factor_scales_all_noise_and_nothing_else():
    found = Policy(PROPORTIONS).calibrate(BERT, epsilon=2.0, **FACTS)
    assert found.rows[1]["noise"] / found.rows[0]["noise"] == pytest.approx(4.0, rel=1e-4)
    for row, old in zip(found.rows, PROPORTIONS, strict=True):
        assert {k: v for k, v in row.items() if k != "noise"} == {k: v for k, v in old.items() if k != "noise"}
    assert "noise" not in found.rows[2]


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({}, {"sampling_rate": 1.0, "steps": 3}),
        ({}, {"sampling": "shuffle", "examples": 5000}),
        ({"unit": "update"}, {"steps": 20}),
        ({"mode": "normalise"}, {"steps": 1}),
    ],
)
def test_every_way_to_count(row, facts):
    found = Policy([{"layers": "all", "clip": 1.0, **row}]).calibrate(BERT, epsilon=3.0, **{**FACTS, **facts})
    assert 2.97 <= epsilon(found, **facts) <= 3.0


def test_a_policy_without_noise_gets_it_where_it_clips():
    rows = [{"layers": "all", "clip": 1.0}, {"layers": "head", "clip": 0.1}, {"layers": "pooler", "keep": 0.5}]
    found = Policy(rows).calibrate(BERT, epsilon=4.0, **FACTS)
    assert found.rows[0]["noise"] == found.rows[1]["noise"]
    assert "noise" not in found.rows[2]


@pytest.mark.parametrize(
    ("rows", "target", "said"),
    [
        ([], 1.0, "gradients leave without clip and noise"),
        ([{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "noise": 0}], 1.0, "without noise (head)"),
        (
            [{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "share": False, "noise": 0}],
            1.0,
            "withheld layers train without noise",
        ),
        (
            [{"layers": "all", "clip": {"quantile": 0.5, "count_noise": 0.5}, "noise": 1.0}],
            1.0,
            "noised counts of the adaptive clips alone cost",
        ),
        ([{"layers": "all", "share": False}], 1.0, "nothing leaves"),
        ([{"layers": "all", "clip": 1.0, "noise": 1.0}], 0.0, "target epsilon is 0.0"),
        ([{"layers": "all", "clip": 1.0, "noise": 1.0}], float("inf"), "target epsilon is inf"),
        ([{"layers": "all", "clip": 1.0, "noise": 1.0}], float("nan"), "target epsilon is nan"),
    ],
)
def test_what_no_noise_can_reach_is_an_error_with_its_reason(rows, target, said):
    with pytest.raises(UserError) as error:
        Policy(rows).calibrate(BERT, epsilon=target, **FACTS)
    assert said in str(error.value)


def test_another_accountant_is_asked_instead():
    class Doubling:
        def epsilon(self, *, sigma, sampling_rate, steps, delta):
            return 2 / sigma

    found = Policy([{"layers": "all", "clip": 1.0}]).calibrate(BERT, epsilon=0.5, accountant=Doubling(), **FACTS)
    assert found.rows[0]["noise"] == pytest.approx(4.0, rel=0.01)


def test_planning_imports_no_torch():
    code = "import sys; from dpguard.policy import calibrate, table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
