"""The NVFLARE filters are the gate: same tensors, same refusals; and a simulator job with real text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("nvflare", reason="the [nvflare] extra is not installed")

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from dpguard.deploy import golden, training
from dpguard.deploy.adapters import nvflare
from dpguard.deploy.checks import Refused
from dpguard.deploy.export import export
from dpguard.deploy.site import Site
from dpguard.policy.ledger import Ledger
from tests.deploy import cases, records


class Client:
    """One client's two filters, without a network."""

    def __init__(self, folder, vectors):
        self.folder, self.vectors = folder, vectors
        (folder / "exported").mkdir(parents=True, exist_ok=True)
        vectors.rehearsal.write(folder / "exported")
        place = (str(folder / "exported"), str(folder / "state"))
        self.task, self.result = nvflare.TaskGate(*place), nvflare.ResultGate(*place)
        self.context = FLContext()
        self.context.get_identity_name = lambda default="": "a"
        self.context.get_job_id = lambda default=None: str(folder)
        for gate in (self.task, self.result):
            gate.place = self

    def open(self, _context):
        site = Site(self.folder / "exported", self.folder / "state", client="a", generator=self.vectors.generator())
        if site.plan.withheld:
            site.keep_personal({n: self.vectors.base[n] for n in site.plan.withheld})
        return site

    def receive(self, weights=None, *, kind=DataKind.WEIGHTS, number=0, **meta):
        sent = DXO(kind, data=nvflare.as_arrays(weights or self.vectors.base), meta=meta).to_shareable()
        sent.set_header(AppConstants.CURRENT_ROUND, number)
        return self.task.process(sent, self.context)

    def send(self, shareable):
        return self.result.process(shareable, self.context)

    def good(self):
        return nvflare.offer(self.vectors.update, self.vectors.rehearsal.message)


@pytest.fixture
def client(tmp_path):
    made = Client(tmp_path, golden.make(cases.rehearsal("whole update")))
    made.receive()
    return made


@pytest.mark.parametrize("name", cases.TABLES)
def test_golden_vectors_through_the_filters(name, tmp_path):
    def through(vectors):
        client = Client(tmp_path, vectors)
        client.receive()
        sent = client.send(client.good())
        assert sent.get_return_code() == ReturnCode.OK
        assert nvflare.FORM not in str(sent)
        return nvflare.as_tensors(sent["DXO"]["data"])

    assert "identical" in golden.compare(golden.make(cases.rehearsal(name)), through)


def test_headers_and_failed_results_leave_nothing_but_a_code(client):
    spoilt = client.good()
    spoilt.set_header("note", "the patient called")
    spoilt["extra"] = "the patient called"
    assert "patient" not in str(client.send(spoilt))
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    failed["trace"] = "the patient called"
    sent = client.send(failed)
    assert sent.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "patient" not in str(sent)


@pytest.mark.parametrize(
    "kind", [k for k in DataKind if k not in (DataKind.WEIGHT_DIFF, DataKind.COLLECTION)], ids=lambda k: k.value
)
def test_no_other_kind_of_result_passes(kind, client):
    """A stock filter that supports one kind is not called for the others, and they leave as they are."""
    with pytest.raises(Refused, match="WEIGHT_DIFF"):
        client.send(DXO(kind, data=nvflare.as_arrays(client.vectors.update)).to_shareable())


def test_other_messages_do_not_pass(client):
    with pytest.raises(Refused, match="data exchange"):
        client.send(Shareable({"weights": client.vectors.update}))
    with pytest.raises(Refused, match="how its update"):
        client.send(DXO(DataKind.WEIGHT_DIFF, data=nvflare.as_arrays(client.vectors.update)).to_shareable())
    spoilt = client.good()
    spoilt["DXO"]["meta"]["initial_metrics"] = {"accuracy": 0.9}
    with pytest.raises(Refused, match="initial_metrics"):
        client.send(spoilt)
    spoilt = client.good()
    spoilt["DXO"]["meta"]["NUM_STEPS_CURRENT_ROUND"] = 17
    with pytest.raises(Refused, match="NUM_STEPS"):
        client.send(spoilt)


def test_tasks_that_are_not_as_rehearsed_are_not_begun(tmp_path):
    client = Client(tmp_path, golden.make(cases.rehearsal("whole update")))
    with pytest.raises(Refused, match="WEIGHTS"):
        client.receive(kind=DataKind.WEIGHT_DIFF)
    with pytest.raises(Refused, match="table"):
        client.receive(**{nvflare.PLAN: "0" * 16})
    with pytest.raises(Refused, match="first round"):
        client.receive({n: v + 1 for n, v in client.vectors.base.items()})
    with pytest.raises(Refused, match="no round"):
        client.send(client.good())


@pytest.mark.slow
def test_two_sites_with_real_text_on_the_simulator(tmp_path):
    home = records.home(tmp_path / "h")
    federation = {"clients": 2, "per_round": 2, "rounds": 4, "local_steps": 2, "batch_size": 4, "learning_rate": 0.05}
    study = records.study(tmp_path / "s", home, federation=federation)
    made = export(study, to="nvflare", policy="dp", out=tmp_path / "e")
    job = made.folder / "job.py"
    job.write_text(job.read_text().replace("given.sites if True", "given.sites if False"))  # all texts at every site
    done = subprocess.run(
        [sys.executable, "job.py", "--rounds", "2", "--data", str(home / "texts.jsonl")],
        cwd=made.folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = list((made.folder / "workspace").rglob(nvflare.WEIGHTS))
    assert len(found) == 1
    after, before = load_file(found[0]), training.first_weights(cases.model())
    assert set(after) == set(before)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    for k in (1, 2):
        place = Ledger.beside(made.folder / "state" / f"site-{k}")
        with Ledger(f"site-{k}", made.rehearsal.model.kind, 1e-3, path=place) as ledger:
            assert ledger.messages == 4
