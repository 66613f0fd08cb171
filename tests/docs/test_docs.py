"""What the documentation shows is what runs: tutorials, example files, commands, the site itself."""

from __future__ import annotations

import ast
import html
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import ElectraConfig, ElectraForSequenceClassification

import dpguard
from dpguard.attacks import panel
from dpguard.cli.main import app
from dpguard.engine.accounting import guarantee
from dpguard.engine.gradients import gradient, running_as
from dpguard.inputs.batch import collate
from dpguard.inputs.family import families, slots
from dpguard.policy.table import Policy
from dpguard.study.spec import Study
from tests import messages, tiny

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]


@pytest.fixture
def as_plugin(monkeypatch):
    """An example file as if it lay in a room's folder."""

    def lay(package, path, folder):
        (folder / path.name).write_text(path.read_text())
        monkeypatch.setattr(
            importlib.import_module(package), "__path__", [*importlib.import_module(package).__path__, str(folder)]
        )
        found = importlib.import_module(package).__spec__
        monkeypatch.setattr(found, "submodule_search_locations", [*found.submodule_search_locations, str(folder)])

    yield lay
    for name in [n for n in sys.modules if n in ("dpguard.attacks.nearest", "dpguard.inputs.families.electra")]:
        del sys.modules[name]
    families.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_message", ["one matrix: 2.0%", "ROUGE-L 1.00 by span, certain: True", "by prior, certain: False"]),
        ("private_training", ["8 steps, epsilon 4.5"]),
        ("a_budget", ["flat: noise [1.3969], epsilon 2.98", "twice the noise below: noise [3.1237, 1.5619]", "0.054"]),
    ],
)
def test_a_tutorial_runs(name, words, capsys):
    runpy.run_path(str(DOCS / "tutorials" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert all(word in out for word in words), out


def test_the_example_policy():
    policy = Policy.load(DOCS / "examples" / "policy.yaml")
    model = tiny.loaded("bert").module
    plan = policy.plan(slots(model))
    assert 0 < plan.shared_fraction < 1
    found = guarantee(plan, sampling_rate=1.0, steps=1, delta=1e-5)
    assert found.formal
    assert any(rule.keep == 0.1 for rule in plan.values())


def test_the_example_study():
    study = Study.load(DOCS / "examples" / "my-study.yaml")
    assert [named.label for named in study.policies] == ["none", "dp", "upper-blocks"]
    assert study.policies[1].epsilon == 8


def test_the_example_attack_reads_a_message(as_plugin, tmp_path):
    as_plugin("dpguard.attacks", DOCS / "examples" / "nearest.py", tmp_path)
    public = ("please call her soon", *tiny.SENTENCES)
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[1:2], (1,), public=public)
    before = {k: v.clone() for k, v in seen.model.state_dict().items()}
    outcomes = panel.run_panel(seen, ["nearest"], 0)
    found = outcomes[-1].reconstruction
    assert seen.disclosed.tokenizer.decode(found.sequences[0], skip_special_tokens=True) == tiny.SENTENCES[1]
    assert found.notes["cosine"] == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in seen.model.state_dict().items())
    several, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:2], (1, 0), public=public)
    assert "several texts" in panel.attack("nearest").applicable(several)


def test_the_example_family_knows_every_parameter(as_plugin, tmp_path):
    config = ElectraConfig(
        vocab_size=len(tiny.tokenizer()), embedding_size=32, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=48, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ElectraForSequenceClassification(config).eval()
    with pytest.raises(dpguard.UserError):
        slots(model)
    families.cache_clear()
    as_plugin("dpguard.inputs.families", DOCS / "examples" / "electra.py", tmp_path)
    found = slots(model)
    assert {s.role for s in found if s.block == 1} >= {"query", "key", "value", "attention_output", "mlp_in", "mlp_out"}
    plan = Policy.load("block[1].attention.query").plan(found)
    batch = collate(list(tiny.SENTENCES[:2]), [0, 1], tiny.tokenizer())
    sent = dpguard.Client(model, plan).observe(batch).tensors
    with running_as(model, "eval"):
        expected = gradient(model, batch, list(sent))
    for name, tensor in sent.items():
        assert torch.allclose(tensor, expected[name] / 2, atol=1e-6)


def _commands():
    for page in PAGES:
        for block in re.findall(r"(?ms)^```[a-z]*\n(.*?)^```|(?m:^ {4}(dpguard .*)$)", page.read_text("utf-8")):
            for line in "\n".join(block).splitlines():
                if line.startswith("dpguard "):
                    yield pytest.param(line, id=f"{page.name}: {line[:50]}")


@pytest.mark.parametrize("line", list(_commands()))
def test_a_command_in_the_docs_can_be_parsed(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"no command {words[0]!r}"
    command.make_context(command.name, words)


def test_every_file_that_a_page_shows_is_there():
    shown = [
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"(?m)^ *--8<--\n *(\S+)\n *--8<--$", page.read_text("utf-8"))
    ]
    assert {name for _, name in shown} >= {"examples/nearest.py", "examples/electra.py", "tutorials/one_message.py"}
    assert all((DOCS / name).is_file() for _, name in shown)
    marks = sum(len(re.findall("8 ?<", page.read_text("utf-8"))) for page in PAGES)
    assert marks == 2 * len(shown)  # a formatter once took the mark for a comparison


def test_every_study_that_the_docs_name_exists():
    for page in PAGES:
        for name in re.findall(r"NAME=([a-z-]+)", page.read_text("utf-8")):
            assert (ROOT / "studies" / f"{name}.yaml").is_file(), (page.name, name)


def test_the_api_page_has_all_that_the_pages_and_the_top_package_name():
    shown = re.findall(r"(?m)^::: (dpguard\.\S+)$", (DOCS / "api.md").read_text("utf-8"))
    assert len(shown) == len(set(shown))
    for name in set(dpguard.__all__) - {"__version__"}:
        assert f"{dpguard._HOME[name]}.{name}" in shown
    code = [path.read_text("utf-8") for folder in ("examples", "tutorials") for path in (DOCS / folder).glob("*.py")]
    for node in (node for text in code for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)):
        for name in node.names if node.module.startswith("dpguard.") else ():
            assert any(f"{one}.".startswith(f"{node.module}.{name.name}.") for one in shown), name.name


def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="the [docs] extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text("utf-8")))
        assert not re.search("-8 ?< ?-", text), (page.name, "a file that was to be shown is not")
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?://[^\"]+)", page.read_text("utf-8"))
        assert not loaded, (page.name, loaded)
