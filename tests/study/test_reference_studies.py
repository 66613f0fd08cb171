"""studies/: every file can be read; the smoke versions run; nothing private is in what gets committed."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpguard.cli.main import main
from dpguard.documents import Document
from dpguard.policy.calibrate import with_some_noise
from dpguard.policy.reasons import why_infinite
from dpguard.study.schedule import REACH, public_learning_rate
from dpguard.study.spec import Study
from dpguard.study.store import Store
from tests.study.in_process import InProcess

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "studies").rglob("*.yaml"))
SMOKE = sorted((ROOT / "studies" / "smoke").glob("*.yaml"))
QUESTIONS = ("which-part-leaks", "does-dp-protect", "clip-prune-withhold", "fixed-budget")
REFERENCE = [path for path in STUDIES if path.parent.name == "studies" and path.name.startswith(QUESTIONS)]


@pytest.mark.parametrize("path", STUDIES, ids=[str(p.relative_to(ROOT / "studies")) for p in STUDIES])
def test_a_study_can_be_read(path, monkeypatch):
    monkeypatch.setenv("DPGUARD_DATA", "/data")
    for name in ("DPGUARD_TASK", "DPGUARD_MODEL", "DPGUARD_BATCH", "DPGUARD_TARGETS", "DPGUARD_RANK"):
        monkeypatch.delenv(name, raising=False)
    study = Study.load(path)
    assert study.question.endswith("?")
    assert "none" in [named.label for named in study.policies]
    monkeypatch.setenv("DPGUARD_TASK", "sst2")
    monkeypatch.setenv("DPGUARD_MODEL", "bert-base-uncased")
    if path in REFERENCE:
        other = Study.load(path)
        lora = study.model.removeprefix("minilm")
        assert lora in ("", "+lora32")
        assert (other.data.path, other.model) == ("/data/sst2.train.jsonl", f"bert-base-uncased{lora}")
        assert other.name == re.sub("cola|rotten_tomatoes", "sst2", study.name)


@pytest.mark.parametrize("path", REFERENCE, ids=[p.stem for p in REFERENCE])
def test_a_reference_study_says_how_it_is_run_what_it_costs_and_where_it_ends(path):
    head = path.read_text().split("\nname:")[0]
    assert re.search(rf"make study NAME={path.stem} DATA=", head)
    assert re.search(r"# COST.*\d", head)
    assert "# LIMITS" in head


def test_every_question_has_its_smoke_version():
    assert sorted(p.stem for p in SMOKE) == sorted(QUESTIONS)


ATTENTION = ("qkv", "query", "key", "value", "output")
ROLES = (*(f"attention.{part}" for part in ATTENTION), "mlp.in", "mlp.out")


@pytest.fixture(scope="module")
def bert():
    """The slots of a BERT of so many blocks, and with LoRA on it; its width is no matter here."""
    from dpguard.inputs.family import slots
    from tests import tiny

    def of(blocks):
        return tiny.module("bert", width=16, blocks=blocks)

    return {**{blocks: slots(of(blocks)) for blocks in (6, 12)}, "lora": slots(tiny.lora(of(12)))}


@pytest.mark.parametrize("blocks", [6, 12])
@pytest.mark.parametrize("name", ["which-part-leaks", "which-part-leaks.full"])
def test_the_map_has_every_block_and_role(name, blocks, bert, monkeypatch):
    monkeypatch.setenv("DPGUARD_DATA", "/data")
    labels = {named.label for named in Study.load(ROOT / "studies" / f"{name}.yaml").on(bert[blocks]).policies}
    expected = {f"part block={b} part={r}" for b in range(blocks) for r in ROLES}
    assert labels == {"none", "encoder", *(f"block block={b}" for b in range(blocks)), *expected}


@pytest.mark.parametrize("path", [p for p in STUDIES if p not in SMOKE], ids=lambda p: p.stem)
def test_a_study_plans_a_model_of_twelve_blocks(path, bert, monkeypatch):
    monkeypatch.setenv("DPGUARD_DATA", "/data")
    slots = bert["lora" if path.stem.endswith("lora") else 12]
    study = Study.load(path).on(slots)
    for named in study.policies:
        plan = with_some_noise(named.policy).plan(slots) if named.epsilon else named.plan(slots)
        if named.epsilon:  # all that leaves is clipped and noised, or there is no noise that reaches it
            assert why_infinite(plan, 100) == (), named.label


def test_six_blocks_are_the_cells_they_were(bert, monkeypatch):
    """Records of MiniLM are found by ids that hold the rows: as if each block were written out, and no row more."""
    monkeypatch.setenv("DPGUARD_DATA", "/data")
    text = (ROOT / "studies" / "which-part-leaks.yaml").read_text()
    listed = Study.read(Document.parse(text.replace('"block[*]"}', "[0, 1, 2, 3, 4, 5]}").replace(
        'block: "block[*]"\n', "block: [0, 1, 2, 3, 4, 5]\n")))  # fmt: skip
    data = {"name": "d", "hash": "2", "train": 8000, "test": 1000}
    found = Study.read(Document.parse(text)).on(bert[6])
    assert len(listed.policies) == 2 + 6 + 42
    assert found.cells({"hash": "1"}, data) == listed.cells({"hash": "1"}, data)
    for name in ("fixed-budget", "fixed-budget.full"):
        fitted = [n for n in Study.load(ROOT / "studies" / f"{name}.yaml").on(bert[6]).policies if "fitted" in n.label]
        layers = ["embeddings", *(f"block[{b}]" for b in range(6)), "pooler", "head"]
        assert fitted
        assert all([row["layers"] for row in n.table] == layers for n in fitted)
        assert all(set(row) == {"layers", "clip", "noise"} for n in fitted for row in n.table)


def test_the_public_rule():
    # its anchor, the inverse root law, and two digits
    assert public_learning_rate(202) == 5.0e-4
    for steps in (1, 7, 83, 1_000, 17_060):
        assert public_learning_rate(steps) == pytest.approx(REACH / math.sqrt(steps), rel=0.05)
        assert public_learning_rate(4 * steps) == pytest.approx(public_learning_rate(steps) / 2, rel=0.1)
    with pytest.raises(ValueError, match="steps=0"):
        public_learning_rate(0)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dpguard", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture
def in_process(monkeypatch):
    """`dpguard run` with its cells in this process: no worker imports torch for them, all else is as it is."""
    monkeypatch.setattr("dpguard.study.runner.Workers", InProcess)
    for name in ("dpguard.study.runner.warm_up", "dpguard.cli.studies.warm_up"):
        monkeypatch.setattr(name, lambda preload, threads: None)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """What the four versions have in common is made once: entries go by the content that they were made from."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("path", SMOKE, ids=[p.stem for p in SMOKE])
def test_a_smoke_version_runs(path, tmp_path, monkeypatch, shared_cache):
    (tmp_path / "cache").symlink_to(shared_cache)
    assert run(monkeypatch, "run", path, "--out", tmp_path) == 0
    with (tmp_path / "frontier.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert float(rows["none"]["leakage"]) > 0.8  # the attack has power here
    with Store.open(tmp_path) as store:
        records = store.records()
    trained = {record.cell.policy for record in records if record.cell.leg == "utility"}
    assert "none" in trained
    for policy, row in rows.items():
        assert math.isfinite(float(row["leakage"]))
        assert math.isfinite(float(row["utility"])) if policy in trained else not row["utility"]
    # the figures of the report are those of the records: the strongest attack's mean over the targets
    for policy, row in rows.items():
        means: dict[tuple[str, str], list[float]] = {}
        for record in records:
            if (record.cell.leg, record.cell.policy) == ("leakage", policy):
                for score in record.result["scores"]:
                    key = score["attack"], record.cell.settings["at"]
                    means.setdefault(key, []).append(score["metrics"]["rougeL"])
            if (record.cell.leg, record.cell.policy) == ("utility", policy):
                assert float(row["utility"]) == pytest.approx(record.result["metrics"]["accuracy"], abs=1e-6)
        assert float(row["leakage"]) == pytest.approx(max(sum(v) / len(v) for v in means.values()), abs=1e-6)
    for name in ("flat", "per-block", "more-noise-below"):
        if path.stem == "fixed-budget":
            assert 2.97 <= float(rows[name]["epsilon"]) <= 3


@pytest.fixture
def make(tmp_path, monkeypatch):
    """``make study`` with a dpguard that only says what it was asked."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    monkeypatch.delenv("DPGUARD_DATA", raising=False)
    (tmp_path / "dpguard").write_text('#!/bin/sh\nprintf \'<%s>\' "$DPGUARD_DATA" "$@"; echo\n')
    (tmp_path / "dpguard").chmod(0o755)

    def make(*words):
        command = [
            "make",
            "-s",
            "-o",
            ".venv/.installed-minilm,lora",
            "study",
            "PYTHON=false",
            f"BIN={tmp_path}",
            *words,
        ]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    return make


def test_one_point_is_one_command(make):
    status, said = make("NAME=which-part-leaks", "DATA=/d", "ONLY=part block=3 part=attention.query")
    out = "reports/which-part-leaks-cola-only-part-block-3-part-attention.query"
    assert (status, said[0]) == (
        0,
        f"</d><run><studies/which-part-leaks.yaml><--out><{out}><--only><part block=3 part=attention.query>",
    )
    status, said = make("NAME=which-part-leaks", "DATA=/d", "TASK=sst2", "MODEL=models/base")
    assert said[0] == "</d><run><studies/which-part-leaks.yaml><--out><reports/which-part-leaks-sst2-base>"
    status, said = make("NAME=clip-prune-withhold-lora", "DATA=/d", "RANK=8")
    assert (
        said[0]
        == "</d><run><studies/clip-prune-withhold-lora.yaml><--out><reports/clip-prune-withhold-lora-cola-rank-8>"
    )


def test_texts_that_were_not_named_are_asked_for_by_the_word_that_the_user_types(make):
    told = "DATA=FOLDER is missing; expected the folder with rotten_tomatoes.train.jsonl and rotten_tomatoes.validation"
    assert make("NAME=fixed-budget") == (2, [f"{told}.jsonl"])
    assert make("NAME=smoke/fixed-budget")[0] == 0
    status, [said] = make("NAME=fixed")
    assert (status, said.split(";")[0]) == (2, "no studies/fixed.yaml")


PRIVATE = """\
name: private
question: Does a sentence get out?
model: demo
data: {path: texts.jsonl}
policies: {clip-only: }
leakage: {panel: demo, attacks: [rows], targets: 3}
privacy: {delta: 1.0e-3}
"""


@pytest.mark.usefixtures("in_process")
def test_no_private_text_is_in_what_gets_committed(tmp_path, monkeypatch):
    """Report, figures and the Parquet records of other people's texts; the store itself is not committed."""
    source = (ROOT / "dpguard" / "inputs" / "demo" / "train.jsonl").read_text().splitlines()[:60]
    texts = [json.loads(line)["text"] for line in source]
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "study.yaml").write_text(PRIVATE)
    out = tmp_path / "out"
    assert run(monkeypatch, "run", tmp_path / "study.yaml", "--out", out) == 0
    assert run(monkeypatch, "records", "export", out, "--what", "scores") == 0
    assert run(monkeypatch, "records", "export", out) == 0
    with Store.open(out) as store:
        held = [row.text for record in store.records() for row in store.texts(record.cell.id)]
    assert held, "the store does hold them, or this test shows nothing"
    import pandas as pd

    committed = [
        p for p in out.rglob("*") if p.suffix in {".html", ".md", ".csv", ".svg", ".png", ".pdf", ".tex", ".json"}
    ]
    tables = [pd.read_parquet(p).to_csv() for p in out.rglob("*.parquet")]
    assert len(tables) == 2
    assert {"report.html", "report.md", "frontier.csv"} <= {p.name for p in committed}
    written = [p.read_bytes().decode("utf-8", "replace") for p in committed] + tables
    words = {word for text in [*texts, *held] if len(word := text.lower().strip()) > 12}
    for content in written:
        found = [text for text in words if text in content.lower()]
        assert not found, found
    assert os.path.getsize(out / "report.html") > 5_000


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("which-part-leaks-cola/report.html", True),
        ("does-dp-protect-rotten_tomatoes/frontier.csv", True),
        ("fixed-budget-cola/metrics.parquet", True),
        ("clip-prune-withhold-cola/figures/tradeoff.svg", True),
        ("which-part-leaks-cola/records.sqlite", False),
        ("which-part-leaks-cola/records.sqlite-wal", False),
        ("which-part-leaks-cola/weights/a.safetensors", False),
        ("which-part-leaks-cola/cache/a.json", False),
        ("mine/report.html", False),
    ],
)
def test_only_what_holds_no_sentence_can_be_committed_by_mistake(file, kept):
    command = ["git", "check-ignore", "--quiet", f"reports/{file}"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    if done.returncode > 1:
        pytest.skip("no git checkout here")
    assert (done.returncode == 1) == kept
