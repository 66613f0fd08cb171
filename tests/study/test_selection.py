from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.study.grid import NEEDS
from dpguard.study.resume import check_subset
from dpguard.study.runner import run
from dpguard.study.selection import of_policies
from dpguard.study.store import Store


def test_one_policy_comes_with_the_control_and_all_that_it_needs(kit):
    cells = kit.cells(kit.text.replace("[start, end]", "[start, tuned, end]"))
    found = of_policies(cells, ["dp-sgd noise=0.6"])
    assert {c.policy for c in found} == {"none", "dp-sgd noise=0.6"}
    assert [c for c in cells if c in found] == found
    ids = {c.id for c in found}
    assert all(c.settings[NEEDS] in ids for c in found if NEEDS in c.settings)
    assert all(c in found for c in cells if c.policy in ("none", "dp-sgd noise=0.6"))


def test_a_point_run_alone_has_the_records_that_it_has_in_the_whole_study(kit, tmp_path):
    text = kit.text.replace(", seeds: [0, 1]", "").replace("seeds: [0, 1, 2]", "seeds: [0]")
    study, cells = kit.study(text), kit.cells(text)
    found = {}
    for name, some in (("whole", cells), ("alone", of_policies(cells, ["dp-sgd noise=0.6"]))):
        assert run(study, tmp_path / name, some, execute=kit.execute, workers=2, quiet=True).done == len(some)
        with Store.open(tmp_path / name) as store:
            found[name] = {
                r.cell.id: (r.cell.policy, r.status, r.result, store.texts(r.cell.id)) for r in store.records()
            }
    assert {policy for policy, *_ in found["alone"].values()} == {"none", "dp-sgd noise=0.6"}
    assert found["alone"] == {key: told for key, told in found["whole"].items() if key in found["alone"]}


def test_an_unknown_policy_is_named(kit):
    with pytest.raises(UserError, match=r"no policy 'dp-sgd noise=0\.5'; did you mean 'dp-sgd noise="):
        of_policies(kit.cells(), ["dp-sgd noise=0.5"])


def test_some_policies_take_the_place_of_no_more(kit, tmp_path):
    cells = kit.cells()
    some, one = of_policies(cells, ["dp-sgd noise=0.6", "last-block"]), of_policies(cells, ["last-block"])
    check_subset(tmp_path, one)
    with Store.open(tmp_path, create=True) as store:
        store.set_study("s", "name: s", {"name": "s"}, one)
    check_subset(tmp_path, one)
    check_subset(tmp_path, some)
    for held in (some, cells):
        with Store.open(tmp_path, create=True) as store:
            store.set_study("s", "name: s", {"name": "s"}, held)
        with pytest.raises(UserError, match=r"--only: .* holds more policies than are asked for \('dp-sgd noise=0"):
            check_subset(tmp_path, one)
    check_subset(tmp_path, cells)
