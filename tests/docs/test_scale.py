"""The files to copy for Slurm, Kubernetes and CI do what they say."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dpguard.documents import Document
from dpguard.study.search import searches
from dpguard.study.shards import Shard
from dpguard.study.spec import Study

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
PAGE = (EXAMPLES.parent / "studies-at-scale.md").read_text()


def test_the_slurm_script_runs_its_shard(tmp_path):
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    fake = tmp_path / "dpguard"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    array = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **array, "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        ["bash", str(script), "my study.yaml"], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "run my study.yaml --shard 2/3 --out reports/shards/2 --workers 8\n"
    assert subprocess.run(["bash", str(script)], env=environ, capture_output=True, check=False).returncode != 0


def test_the_kubernetes_jobs_are_whole():
    shards, merge = yaml.safe_load_all((EXAMPLES / "k8s-job.yaml").read_text())
    assert {shards["kind"], merge["kind"]} == {"Job"}
    [command] = shards["spec"]["template"]["spec"]["containers"][0]["args"]
    count = shards["spec"]["completions"]
    assert f'--shard "$JOB_COMPLETION_INDEX/{count}"' in command
    for job in (shards, merge):
        pod = job["spec"]["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_ci_matrix_covers_its_shards():
    jobs = yaml.safe_load((EXAMPLES / "ci-matrix.yaml").read_text())["jobs"]
    numbers = jobs["shard"]["strategy"]["matrix"]["shard"]
    [command] = [step["run"] for step in jobs["shard"]["steps"] if "dpguard run" in step.get("run", "")]
    count = re.search(r"/(\d+) --out", command)[1]
    found = [Shard.parse(f"{number}/{count}") for number in numbers]
    assert [shard.index for shard in found] == list(range(int(count)))
    assert jobs["merge"]["needs"] == "shard"


def test_the_search_on_the_page_is_a_study():
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "auto:" in text)
    text = f"name: s\nmodel: demo\ndata: demo\nleakage: {{targets: 2}}\n{block}"
    [search] = searches(Study.read(Document.parse(text)))
    assert (search.auto.aim, search.auto.values, search.auto.within) == (0.3, 8, 0.05)


@pytest.mark.parametrize("name", ["slurm.sh", "k8s-job.yaml", "ci-matrix.yaml"])
def test_the_page_shows_the_files(name):
    assert f"--8<--\nexamples/{name}\n--8<--" in PAGE
