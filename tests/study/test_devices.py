from __future__ import annotations

import os
import stat
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpguard.cli.planning import plan_study
from dpguard.cli.warned import unkept, unscored
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.inputs import models, texts
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import slots
from dpguard.measure import utility
from dpguard.policy.layers import Slot
from dpguard.policy.table import Policy
from dpguard.study import devices, ground, legs
from dpguard.study.cache import TENSORS, Cache, weights_key
from dpguard.study.record import Cell, untimed
from dpguard.study.runner import run
from dpguard.study.spec import Study
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


def test_central_training_alone_takes_a_device_and_what_has_to_do_it_again():
    def cell(leg, **settings):
        return Cell(leg, "none", [], {}, {}, settings)

    assert devices.takes_device(cell("utility"))
    assert not devices.takes_device(cell("utility", federation={}))
    assert not devices.takes_device(cell("leakage"))
    assert not devices.takes_device(cell("guarantee"))
    for kept in (True, False):
        attack, rounds = cell("leakage", needs="a"), cell("leakage", needs="a", federation={})
        assert devices.takes_device(attack, lambda trained, kept=kept: kept and trained == "a") != kept
        assert not devices.takes_device(rounds, lambda trained: False)


def test_a_run_gives_devices_to_its_training_cells(kit, tmp_path):
    cells = kit.cells(kit.text.replace("[start, end]", "start"))[:9]
    run(kit.study(), tmp_path, cells, execute=kit.execute, context={"script": {}}, devices=["5"], workers=2, quiet=True)
    assert _devices(tmp_path) == {"guarantee": {""}, "leakage": {""}, "utility": {"5"}}


def _devices(folder):
    seen = defaultdict(set)
    with Store.open(folder) as store:
        for record in store.records():
            seen[record.cell.leg].add(record.result["device"])
    return seen


@pytest.mark.parametrize("kept", [True, False])
def test_an_attack_whose_weights_are_gone_has_a_device_to_train_them_on(kit, tmp_path, kept):
    found = kit.cells(kit.text.replace("[start, end]", "end"))
    cells = [cell for cell in found if cell.policy == "none" and cell.leg != "guarantee" and cell.seed == 0]
    if kept:
        for cell in cells:
            key = weights_key(cell.id)
            Cache(tmp_path).entry(key, TENSORS, Path.read_bytes, lambda: b"w", Path.write_bytes)
    context = {"script": {}, "folder": str(tmp_path)}
    run(kit.study(), tmp_path, cells, execute=kit.execute, context=context, devices=["5"], workers=2, quiet=True)
    assert _devices(tmp_path) == {"leakage": {"" if kept else "5"}, "utility": {"5"}}


STUDY = """\
name: again
model: demo
data: demo
policies: {none: }
leakage: {panel: demo, targets: 1, at: end, attacks: [prior]}
utility: {epochs: 1, batch_size: 32, train_examples: 64}
privacy: {delta: 1.0e-3}
"""


FEDERATED = """\
name: again
model: demo
data: demo
policies: {none: }
leakage: {panel: demo, targets: 1, at: end, attacks: [prior]}
federation: {clients: 4, per_round: 2, rounds: 2, batch_size: 8}
privacy: {delta: 1.0e-5}
"""


@pytest.mark.parametrize("study", [STUDY, FEDERATED], ids=["one place", "federation"])
def test_an_attack_that_trained_again_says_so_and_gives_the_same_record(tmp_path, study):
    planned = plan_study(Study.read(Document.parse(study, "study.yaml")), tmp_path)
    [trained] = [cell for cell in planned.cells if cell.leg == "utility"]
    [attack] = [cell for cell in planned.cells if cell.leg == "leakage"]
    gone, _ = legs.execute(attack, {**planned.context, "cache_gigabytes": 0})
    legs.execute(trained, planned.context)
    there, _ = legs.execute(attack, planned.context)
    assert gone.provenance["trained_again"] == gone.provenance["device"] == "cpu"
    assert "trained_again" not in there.provenance
    assert untimed(gone.result) == untimed(there.result)


def test_weights_that_are_too_large_to_be_kept_are_told():
    study = Study.read(Document.parse(STUDY, "study.yaml"))
    shape = (1000, 1_000_000)
    ground = SimpleNamespace(slots=[Slot("w", shape, "head"), Slot("v", shape, "head", None, "w")])
    told = "cache.gigabytes is 4: trained weights (4 GB) are kept up to half of it"
    assert unkept(study, ground).startswith(told)
    assert unkept(study, SimpleNamespace(slots=ground.slots[1:])) == ""
    assert unkept(Study.read(Document.parse(STUDY.replace("at: end", "at: start"), "study.yaml")), ground) == ""
    assert unkept(Study.read(Document.parse(STUDY + "cache: {gigabytes: 9}\n", "study.yaml")), ground) == ""


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


@pytest.mark.parametrize(
    ("candidates", "attack", "classes", "told"),
    [
        (100, "likelihood", 2, ""),
        (10_000, "likelihood", 3, ""),
        (10_000, "likelihood", 4, "likelihood scores 8,000 of them"),
        (2_000, "likelihood:quick", 2, "likelihood:quick scores 1,500 of them"),
        (10_000, "prior", 9, ""),
    ],
)
def test_candidates_that_will_not_be_scored_are_told(candidates, attack, classes, told):
    text = STUDY.replace("attacks: [prior]", f"attacks: [{attack}], threat: {{candidates: {candidates}}}")
    ground = SimpleNamespace(classes=classes)
    found = unscored(Study.read(Document.parse(text, "study.yaml")), ground)
    assert told in found
    assert bool(told) == bool(found)
