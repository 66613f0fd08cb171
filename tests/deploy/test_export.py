"""An exported folder: what is in it, what it says, and that the receiver's self-test can fail."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from dpguard.deploy import golden, selftest
from dpguard.deploy.export import export, fill
from dpguard.deploy.exporters.opacus import opacus_arguments
from dpguard.deploy.rehearsal import Rehearsal
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy
from tests import tiny
from tests.deploy import cases, records
from tests.deploy.cases import DELTA


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return records.home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def study(tmp_path_factory, home):
    return records.study(tmp_path_factory.mktemp("study") / "s", home)


@pytest.mark.parametrize("framework", ["opacus", "flower", "nvflare"])
def test_a_folder_for_every_framework(framework, study, home, tmp_path):
    made = export(study, to=framework, policy="dp", out=tmp_path / "e")
    names = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert {
        "policy.yaml",
        "rehearsal.json",
        "golden.safetensors",
        "card.json",
        "card.md",
        "self_test.py",
        "README.md",
    } <= names
    assert not any(name.endswith(".txt.txt") for name in names)
    for path in made.folder.rglob("*.py"):
        text = path.read_text()
        assert "@" not in text.replace("@app.", "").replace("@lru_cache", ""), f"a value is missing in {path}"
        compile(text, str(path), "exec")
    assert "seed" not in (made.folder / "rehearsal.json").read_text(), "nothing exported carries a seed"
    found = Rehearsal.read(made.folder)
    assert found.message.kind == "gradient"
    assert (found.message.server, found.message.batch_size, found.rounds) == ("adam", records.BATCH, records.STEPS)
    told = selftest.run(made.folder, model=str(home / "model"))
    assert len(told) == 4
    assert "identical to the bit" in told[1]


def test_the_card_says_what_was_attacked_and_what_is_promised(study, tmp_path):
    made = export(study, to="flower", policy="dp", out=tmp_path / "e")
    card = json.loads((made.folder / "card.json").read_text())
    assert card["attacked"]["what"] == "gradient"
    assert card["attacked"]["as_exported"]
    assert card["leakage"]["this"]["value"] == pytest.approx(0.3)
    assert card["leakage"]["this"]["low"] <= 0.3 <= card["leakage"]["this"]["high"]
    assert card["leakage"]["without_any_defence"]["value"] == 1.0
    assert card["guarantee"]["epsilon"] == made.rehearsal.budget.epsilon
    words = (made.folder / "card.md").read_text()
    assert "Attacked was a gradient of 1 text" in words
    assert (
        "A message is the gradient of one Poisson batch of 8 texts on average (sampling rate 0.25); 8 rounds." in words
    )
    assert "after 8 messages, per example, zero-out adjacency" in words
    assert "What it does not protect" in words


def test_the_recommended_policy_when_none_is_named_and_infinite_epsilon_is_said(study, tmp_path):
    made = export(study, to="opacus", out=tmp_path / "a")
    assert made.rehearsal.policy == made.decision.policy == "dp"
    assert not made.warnings
    bare = export(study, to="opacus", policy="none", out=tmp_path / "b", metrics=["train_loss"])
    assert math.isinf(bare.rehearsal.budget.epsilon)
    assert any("infinite" in warning for warning in bare.warnings)
    assert any("train_loss" in warning for warning in bare.warnings)
    words = (bare.folder / "card.md").read_text()
    assert "No formal guarantee (epsilon = inf)" in words
    assert "why there is none" in words
    assert "train_loss" in words


def test_a_difference_that_was_not_attacked_is_said(home, tmp_path):
    found = records.study(tmp_path / "s", home, threat={"local_steps": 3, "learning_rate": 0.01})
    made = export(found, to="flower", policy="dp", out=tmp_path / "e")
    assert made.rehearsal.message.kind == "delta"
    assert (made.rehearsal.message.local_steps, made.rehearsal.rounds) == (3, records.STEPS // 3)
    assert json.loads((made.folder / "card.json").read_text())["attacked"]["what"] == "3-step delta"
    with pytest.raises(UserError, match="local steps a message"):
        export(found, to="opacus", policy="dp", out=tmp_path / "o")
    bare = records.study(tmp_path / "n", home, leakage=False)
    made = export(bare, to="flower", policy="dp", out=tmp_path / "f")
    assert "Nothing was attacked" in (made.folder / "card.md").read_text()


def test_a_federation_is_exported_as_it_was_rehearsed(home, tmp_path):
    federation = {
        "clients": 2,
        "per_round": 2,
        "rounds": 4,
        "local_steps": 2,
        "batch_size": records.BATCH,
        "learning_rate": 0.05,
    }
    found = records.study(tmp_path / "s", home, federation=federation)
    made = export(found, to="nvflare", policy="dp", out=tmp_path / "e")
    form = made.rehearsal.message
    assert (form.kind, form.local_steps, form.learning_rate, form.server) == ("delta", 2, 0.05, "fedavg")
    for name, value, words in (
        ("view", "aggregate", "secure aggregation"),
        ("error_feedback", True, "error_feedback"),
        ("weights", "size", "weights"),
    ):  # fmt: skip
        other = records.study(tmp_path / name, home, federation={**federation, name: value})
        with pytest.raises(UserError, match=words):
            export(other, to="nvflare", policy="dp", out=tmp_path / f"{name} out")


@pytest.mark.parametrize("policy", ["dp", "none"])
def test_rounds_are_the_study_s_whether_or_not_epsilon_is_finite(policy, home, tmp_path):
    federation = {"clients": 2, "per_round": 2, "rounds": records.STEPS // 2, "local_steps": 2,
                  "batch_size": records.BATCH, "learning_rate": 0.05}  # fmt: skip
    found = records.study(tmp_path / "s", home, federation=federation)
    made = export(found, to="nvflare", policy=policy, out=tmp_path / "e")
    assert made.rehearsal.rounds == Rehearsal.read(made.folder).rounds == federation["rounds"]
    assert f'"--rounds", type=int, default={federation["rounds"]})' in (made.folder / "job.py").read_text()
    words = (made.folder / "card.md").read_text()
    assert "the change of the weights after 2 local steps, each on its own Poisson batch of 8 texts on average" in words
    assert "; 4 rounds." in words
    assert ("after 4 messages (8 noised steps)" in words) == (policy == "dp")
    assert ("after 4 messages, per example" in words) == (policy == "none")


def test_without_a_recommendation_that_is_what_is_said(home, tmp_path):
    found = records.study(tmp_path / "s", home, caps={"max_leakage": 0.01, "max_epsilon": 0.01})
    made = export(found, to="flower", policy="dp", out=tmp_path / "e")
    assert any(warning.startswith("the study recommends no policy (") for warning in made.warnings)
    assert not any("not the policy" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"to": "flowr"}, "did you mean 'flower'"),
        ({"to": "flower", "policy": "adaptve"}, "did you mean 'adaptive'"),
        ({"to": "flower", "policy": "adaptive"}, "quantile"),
    ],
)
def test_mistakes_are_one_sentence(words, message, study, tmp_path):
    with pytest.raises(UserError, match=message):
        export(study, out=tmp_path / "e", **words)
    assert not (tmp_path / "e").exists()


def test_a_full_folder_and_a_changed_model_are_refused(study, home, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(study, to="flower", policy="dp", out=tmp_path / "e")
    other = records.home(tmp_path / "h")
    found = records.study(tmp_path / "s", other)
    tensors = load_file(other / "model" / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, other / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not the one of the study"):
        export(found, to="flower", policy="dp", out=tmp_path / "x")


def test_the_self_test_fails_when_the_gate_or_the_table_changed(study, tmp_path, monkeypatch):
    made = export(study, to="opacus", policy="dp", out=tmp_path / "e")
    assert selftest.main(made.folder, []) == 0
    with monkeypatch.context() as change:
        change.setattr("dpguard.deploy.gate.wire.emit", _half_the_noise())
        assert selftest.main(made.folder, []) == 1
    with monkeypatch.context() as change:
        change.setattr("dpguard.deploy.checks.check_metrics", lambda metrics, allowed: dict(metrics))
        assert selftest.main(made.folder, []) == 1
    table = made.folder / "policy.yaml"
    table.write_text(table.read_text().replace("1.0", "0.5"))
    assert selftest.main(made.folder, []) == 1


def _half_the_noise():
    from dpguard.engine import wire

    real = wire.emit

    def emit(clipped, plan, **more):
        weaker = Policy([{**dict(row), "noise": row["noise"] / 2} for row in plan.rows]).plan(
            [r.slot for r in plan.values()]
        )
        return real(clipped, weaker, **more)

    return emit


def test_golden_vectors_hold_for_every_table(tmp_path):
    for number, name in enumerate(cases.TABLES):
        made = cases.rehearsal(name)
        folder = tmp_path / str(number)
        folder.mkdir()
        made.write(folder)
        golden.make(made).write(folder)
        assert "identical" in golden.compare(golden.Vectors.read(folder, Rehearsal.read(folder)))


def test_stock_opacus_arguments_exist_for_one_flat_group_alone():
    parts = slots(cases.model().module)

    def arguments(rows):
        base = cases.rehearsal("dp-sgd, gradients")
        return opacus_arguments(type(base)(base.study, "x", tuple(rows), base.model, DELTA, base.budget))

    assert arguments([{"layers": "all", "clip": 0.5, "noise": 2.0}]) == {
        "noise_multiplier": 2.0, "max_grad_norm": 0.5, "poisson_sampling": True,
    }  # fmt: skip
    for rows in (
        [],
        [{"layers": "all", "clip": 1.0, "noise": 1.0, "per": "block"}],
        [{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "keep": 0.5}],
        [{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "share": False}],
        [{"layers": "all", "clip": 1.0, "noise": 1.0, "unit": "update"}],
    ):
        assert Policy(rows).plan(parts)
        assert arguments(rows) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "no data file"),
        (31, "the site has 31 texts, and batches of 8 at rate 0.25 were rehearsed; expected at least 32 texts"),
        (-40, "texts.jsonl:40: label is 2; expected a class index below 2"),
    ],
)
def test_the_training_loop_s_mistakes_are_one_sentence_and_status_2(
    rows, words, study, tmp_path, monkeypatch, capsys
):  # fmt: skip
    made = export(study, to="opacus", policy="dp", out=tmp_path / "e")
    data = tmp_path / "texts.jsonl"
    if rows is not None:
        labels = [0] * (abs(rows) - 1) + [2 if rows < 0 else 1]
        data.write_text("".join(json.dumps({"text": "a b c", "label": n}) + "\n" for n in labels))
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(made.folder / "train.py"), run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_exported_training_loop_runs_and_goes_on(study, home, tmp_path):
    made = export(study, to="opacus", policy="dp", out=tmp_path / "e")
    words = [sys.executable, "train.py", "--data", str(home / "texts.jsonl"), "--client", "a"]
    for steps, now, total in ((2, 2, 2), (5, 3, 5)):
        done = subprocess.run(
            [*words, "--steps", str(steps)], cwd=made.folder, capture_output=True, text=True, check=False,
            env=_environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{now} steps now, {total} in all" in done.stdout
        assert "sampling rate 0.125: batches of 8 on average, of 64 texts" in done.stdout, "no text is held out"
        assert "3.44" in done.stdout.split("the card's epsilon")[1].split("rehearsed rate 0.25")[0]
        assert f"the model is in {made.folder / 'state' / 'model.safetensors'}" in done.stdout
        assert "are done" not in done.stdout
    done = subprocess.run(
        [*words, "--steps", "5"], cwd=made.folder, capture_output=True, text=True, check=False, env=_environment()
    )
    assert "all 5 steps asked for are done" in done.stdout, done.stderr
    done = subprocess.run(
        [*words, "--steps", "99"], cwd=made.folder, capture_output=True, text=True, check=False, env=_environment()
    )
    assert "above its budget" in done.stdout, done.stderr


def test_the_training_loop_refuses_other_weights_and_no_steps(study, home, tmp_path, monkeypatch, capsys):
    made = export(study, to="opacus", policy="dp", out=tmp_path / "e")
    shutil.copytree(home / "model", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, tmp_path / "other" / "model.safetensors")
    for words, said in (
        (["--model", str(tmp_path / "other")], "first round"),
        (["--steps", "-3"], "--steps is -3; expected a number from 1"),
        (["--save-every", "0"], "--save-every is 0; expected a number from 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(home / "texts.jsonl"), *words])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(made.folder / "train.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert (stopped.value.code, err.count("\n")) == (2, 1), err
        assert said in err
    assert not (made.folder / "state").exists()


KILL = """
import os, runpy, signal, sys
import dpguard.engine.private_optimizer as private
real, count = private.PrivateOptimizer.step, 0
def step(self, *a, **k):
    global count
    done = real(self, *a, **k)
    count += self.stepped
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
private.PrivateOptimizer.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_from_what_was_saved_and_its_ledger_from_what_was_spent(study, home, tmp_path):
    made = export(study, to="opacus", policy="dp", out=tmp_path / "e")
    words = ["train.py", "--data", str(home / "texts.jsonl"), "--client", "a", "--save-every", "2", "--steps", "7"]

    def run(*start):
        return subprocess.run(
            [sys.executable, *start, *words], cwd=made.folder, capture_output=True, text=True, check=False,
            env=_environment(),
        )  # fmt: skip

    assert run("-c", KILL).returncode == -signal.SIGKILL
    kept = (made.folder / "state" / "training.safetensors").read_bytes()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "the ledger holds 5 steps, the saved weights 4: the others were stopped and stay spent" in done.stdout
    assert "2 steps now, 7 in all" in done.stdout
    # a ledger that has gone, an older ledger, damaged weights: one sentence, and nothing is trained
    state = made.folder / "state"
    (state / "training.safetensors").write_bytes(kept[:1000])
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "training.safetensors is damaged" in done.stderr
    (state / "dpguard-ledger.json").unlink()
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "is gone, though 7 messages were entered" in done.stderr
    (state / "dpguard-ledger.json.lock").unlink()
    (state / "training.safetensors").write_bytes(kept)
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "holds 4 steps and the ledger beside it 0" in done.stderr


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("framework", ["opacus", "flower", "nvflare"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_project_on_a_model_with_lora_installs_what_reads_it(framework, lora, tmp_path):
    made = cases.model()
    if lora:
        made = replace(made, module=tiny.lora(made.module))
    draft = cases.rehearsal("dp-sgd, gradients", made=made)
    fill(framework, tmp_path, draft, {})
    [told] = [p for p in tmp_path.iterdir() if p.name in ("requirements.txt", "pyproject.toml")]
    needs = re.findall(r"dpguard(?:\[([a-z,]*)\])?(?:==|\")", told.read_text())
    assert needs
    assert any("lora" in extras.split(",") for extras in needs) == lora
    assert "LORA@" not in told.read_text()
