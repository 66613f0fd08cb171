"""Sites at the edge: texts too long, too many or too few; differences that rounding or nobody's texts made."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from dpguard.deploy import checks, files, training
from dpguard.deploy.checks import Refused
from dpguard.deploy.gate import outgoing
from dpguard.deploy.golden import FILE, Vectors
from dpguard.deploy.rehearsal import Budget, Rehearsal
from dpguard.deploy.site import Site
from dpguard.engine import noise
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests.deploy import cases
from tests.deploy.test_site import DP, exported, rounds


def test_a_text_that_is_too_long_is_found_before_any_round(tmp_path):
    model, path = cases.model(), tmp_path / "own.jsonl"
    long = " ".join(["ward"] * (model.max_tokens + 1))
    path.write_text(json.dumps({"text": "the ward", "label": 0}) + "\n" + json.dumps({"text": long, "label": 1}) + "\n")
    with pytest.raises(UserError, match=r"own.jsonl:2: .*does not fit the model's"):
        training.own_texts(str(path), 2, model)
    assert len(training.own_texts(str(path), 2)) == 2


def test_a_delta_above_one_over_the_sites_texts_is_refused():
    made = cases.rehearsal(DP)
    most = round(1 / made.budget.delta)
    training.check_delta(made, most)
    with pytest.raises(Refused, match=rf"the site has {most + 1} texts, and epsilon was rehearsed at delta"):
        training.check_delta(made, most + 1)
    training.check_delta(dataclasses.replace(made, budget=Budget(0.5, math.inf, 1)), 10**9)  # promises nothing


def test_a_site_with_fewer_texts_than_a_batch_samples_all_of_them():
    form = dataclasses.replace(cases.rehearsal(DP).message, batch_size=32, sampling_rate=1.0)
    assert training.sampling_rate(form, 30) == 1.0


@pytest.mark.parametrize(("epsilon", "limit"), [(math.inf, None), (0.0, 2.2250738585072014e-308), (3.0, 3.0)])
def test_an_epsilon_of_0_is_a_budget(epsilon, limit):
    assert Budget(1e-5, epsilon, 10).limit == limit


def test_a_ledger_goes_on_under_a_stricter_table_and_remembers(tmp_path):
    folder, _made = exported(tmp_path / "e")
    with Site(folder, tmp_path / "s", client="a") as site:
        weights = rounds(site, 1)
        spent = site.ledger.epsilon()
    own = tmp_path / "own.yaml"
    rows = [{**row, "noise": 2 * row["noise"]} if "noise" in row else row for row in Rehearsal.read(folder).rows]
    own.write_text(json.dumps({"name": "own", "rows": [dict(row) for row in rows]}))
    with pytest.raises(UserError, match="allow_change"):
        Site(folder, tmp_path / "s", client="a", table=own)
    with Site(folder, tmp_path / "s", client="a", table=own, allow_change=True) as site:
        rounds(site, 1, start=2, weights=weights)
        assert site.ledger.messages == 2 * site.messages_a_round
        assert site.ledger.epsilon() > spent


def _plan(rows):
    return Policy(rows).plan(slots(cases.model().module))


def test_a_client_that_drew_nothing_sends_noise_under_a_clip_of_the_whole():
    """Refusing would tell the server which clients had nothing to train on."""
    plan = _plan([{"layers": "all", "clip": 0.5, "noise": 1.0, "unit": "update"}])
    base = training.first_weights(cases.model())
    zeros = {name: torch.zeros_like(base[name]) for name in plan.shared}
    made = outgoing(zeros, plan, content="raw", batch_size=4, generator=noise.source(None), base=base)
    assert all(bool(value.any()) for value in made.wire.values())
    clean = _plan([{"layers": "all", "share": True}])
    with pytest.raises(Refused, match="zero everywhere"):
        outgoing(zeros, clean, content="raw", batch_size=4, generator=noise.source(None), base=base)


def test_changes_below_the_weights_own_spacing_are_rounding_and_others_are_missing_noise():
    plan = _plan([{"layers": "all", "clip": 0.1, "noise": 0.5}])
    source = torch.Generator().manual_seed(0)
    base = {name: torch.ones(plan[name].slot.shape) for name in plan.shared}
    moved = {n: (b + 7.8e-7 * torch.randn(b.shape, generator=source)) - b for n, b in base.items()}
    zeros = sum(int((m == 0).sum()) for m in moved.values()) / sum(m.numel() for m in moved.values())
    assert zeros > checks.MOST_ZEROS
    checks.check_noised(moved, plan, base)
    small = {name: 0.01 * b for name, b in base.items()}
    with pytest.raises(Refused, match="many entries at zero"):
        checks.check_noised(moved, plan, small)
    with pytest.raises(Refused, match="many entries at zero"):
        checks.check_noised({name: torch.zeros_like(b) for name, b in base.items()}, plan, base)


def test_damaged_files_of_an_exported_folder_are_said(tmp_path):
    folder, made = exported(tmp_path / "e")
    (folder / FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="is damaged"):
        Vectors.read(folder, made)
    plain = json.loads((folder / "rehearsal.json").read_text())
    for change in ({"plan": None}, {"budget": {**plain["budget"], "epsilon": "eight"}}):
        broken = {**plain, **change}
        if change == {"plan": None}:
            del broken["plan"]
        (folder / "rehearsal.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"rehearsal.json is damaged"):
            Rehearsal.read(folder)


def test_a_disk_that_is_full_is_said_and_the_old_file_stays(tmp_path, monkeypatch):
    files.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")

    def full(*_args, **_named):
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.save({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert bool(files.load(tmp_path / "x.safetensors")[0]["a"].all())
