from __future__ import annotations

import os
import stat

import pytest
import torch

from dpguard.errors import UserError
from dpguard.inputs import models, texts
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import slots
from dpguard.measure import utility
from dpguard.policy.table import Policy
from dpguard.study import devices, ground
from dpguard.study.record import Cell
from dpguard.study.runner import run
from dpguard.study.store import Store

LISTED = "GPU 0: NVIDIA A100 (UUID: GPU-a)\n  MIG 1g.5gb Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA A100 (UUID: GPU-c)\n"


@pytest.mark.parametrize(
    ("visible", "found"),
    [("1", ("1",)), ("GPU-a, MIG-b", ("GPU-a", "MIG-b")), ("", ()), ("-1", ()), ("0,-1,2", ("0",)), ("NoDevFiles", ())],
)
def test_the_environment_comes_first(visible, found, tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    assert devices.chosen("auto", {"CUDA_VISIBLE_DEVICES": visible}, files=tmp_path) == found


def test_then_the_drivers_files_then_nvidia_smi(tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert devices.chosen("auto", {}, files=tmp_path / "gpus", listed=lambda: "") == ("0", "1", "2")
    assert devices.chosen("auto", {}, files=missing, listed=lambda: LISTED) == ("0", "1")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && cat <<'END'\n{LISTED}END\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert devices.chosen("auto", {}, files=missing) == ("0", "1")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert devices.chosen("auto", {}, files=missing) == ()


@pytest.mark.parametrize("asked", ["cpu", "0,0", "0,", "", "-1"])
def test_what_names_no_device(asked):
    with pytest.raises(UserError, match="expected auto, none, or each device once"):
        devices.chosen(asked, {})


def test_central_training_alone_takes_a_device():
    def cell(leg, **settings):
        return Cell(leg, "none", [], {}, {}, settings)

    assert devices.takes_device(cell("utility"))
    assert not devices.takes_device(cell("utility", federation={}))
    assert not devices.takes_device(cell("leakage"))
    assert not devices.takes_device(cell("guarantee"))


def test_a_run_gives_devices_to_its_training_cells(kit, tmp_path):
    cells = kit.cells()[:9]
    run(kit.study(), tmp_path, cells, execute=kit.execute, context={"script": {}}, devices=["5"], workers=2, quiet=True)
    with Store.open(tmp_path) as store:
        seen = {record.cell.leg: record.result["device"] for record in store.records()}
    assert seen == {"guarantee": "", "leakage": "", "utility": "5"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_torch_cannot_use():
    assert ground.device_of({}) == "cpu"
    assert ground.device_of({"device": "cuda", "need_device": False}) == "cpu"
    with pytest.raises(UserError, match="torch cannot use the CUDA device"):
        ground.device_of({"device": "cuda", "need_device": True})


def test_training_moves_every_batch_and_names_no_device_of_its_own(monkeypatch):
    corpus = texts.load("demo")
    moved = []
    to = Batch.to

    def noted(batch, device):
        moved.append(str(device))
        return to(batch, device)

    monkeypatch.setattr(Batch, "to", noted)
    states = []
    for options in ({}, {"device": "cpu"}):
        model = models.load("demo", labels=corpus.classes, seed=0)
        plan = Policy([{"layers": "all", "clip": 1.0, "noise": 0.5}]).plan(slots(model.module))
        before = len(moved)
        trained = utility.train(
            model.module, model.tokenizer, corpus.train[:64], plan,
            epochs=1, batch_size=16, learning_rate=1e-3, seed=3, **options,
        )  # fmt: skip
        assert len(moved) - before >= trained.steps == 4
        states.append((model.module.state_dict(), utility.predict(model.module, model.tokenizer, corpus.test[:8])))
    assert set(moved) == {"cpu"}
    assert states[0][1] == states[1][1]
    assert all(torch.equal(states[0][0][name], states[1][0][name]) for name in states[0][0])
