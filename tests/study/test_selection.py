from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.selection import of_policies


def test_one_policy_comes_with_the_control_and_all_that_it_needs(kit):
    cells = kit.cells(kit.text.replace("[start, end]", "[start, tuned, end]"))
    found = of_policies(cells, ["dp-sgd noise=0.6"])
    assert {c.policy for c in found} == {"none", "dp-sgd noise=0.6"}
    assert [c for c in cells if c in found] == found
    ids = {c.id for c in found}
    assert all(c.settings[NEEDS] in ids for c in found if NEEDS in c.settings)
    assert all(c in found for c in cells if c.policy in ("none", "dp-sgd noise=0.6"))


def test_an_unknown_policy_is_named(kit):
    with pytest.raises(UserError, match=r"no policy 'dp-sgd noise=0\.5'; did you mean 'dp-sgd noise="):
        of_policies(kit.cells(), ["dp-sgd noise=0.5"])
