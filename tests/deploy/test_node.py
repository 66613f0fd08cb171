"""What people write into a node's configuration: a word that is not understood never opens anything."""

from __future__ import annotations

import math

import pytest

from dpguard.deploy.node import epsilon, flag
from dpguard.deploy.site import Site
from dpguard.errors import UserError
from tests.deploy.test_site import exported


@pytest.mark.parametrize(
    ("value", "meant"), [(True, True), (False, False), ("true", True), ("false", False)],
)  # fmt: skip
def test_true_and_false(value, meant):
    assert flag("dpguard-allow-change", value) is meant


@pytest.mark.parametrize("value", ["no", "False", "", "0", 0, 1, 1.0, None])
def test_anything_else_is_no_flag(value):
    with pytest.raises(UserError, match=rf"dpguard-allow-change is {value!r}; expected true or false"):
        flag("dpguard-allow-change", value)


@pytest.mark.parametrize(("value", "meant"), [(None, None), (2, 2.0), ("2.5", 2.5), (1e-3, 1e-3)])
def test_budgets(value, meant):
    assert epsilon("dpguard-budget", value) == meant


@pytest.mark.parametrize("value", ["two", "", True, 0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_no_number_is_said(value):
    with pytest.raises(UserError, match=r"^dpguard-budget is .*; expected a number above 0"):
        epsilon("dpguard-budget", value)


@pytest.mark.parametrize("more", [{"allow_change": "no"}, {"allow_change": 1}, {"budget": "two"}, {"budget": math.nan}])
def test_a_site_reads_as_strictly_whoever_opens_it(tmp_path, more):
    folder, _made = exported(tmp_path / "e")
    with pytest.raises(UserError, match=r"expected (true or false|a number above 0)"):
        Site(folder, tmp_path / "s", client="a", **more)
    assert not (tmp_path / "s").exists(), "nothing was begun"
