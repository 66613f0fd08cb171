"""``dpguard audit``: does a policy's mechanism do what its claims say?"""

from __future__ import annotations

import json

import torch
from rich.text import Text

from dpguard.cli.console import console, table
from dpguard.cli.progress import bar
from dpguard.engine.audit.report import Report
from dpguard.engine.audit.run import audit
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy

_STYLE = {"pass": "green", "fail": "bold red", "not applicable": "dim"}


def print_audit(policy: str, model: str | None, *, batch_size: int, seed: int, thorough: bool, as_json: bool) -> int:
    """Audit one policy, print a table of checks with figures and one line; 1 when a check failed, else 0."""
    torch.set_num_threads(1)  # thousands of small tensors: a second thread only waits for the first
    rows = Policy.load(policy)
    loaded = models.load(model) if model is not None else None
    chosen = None if loaded is not None else slots(models.load("demo").module)
    report = audit(
        rows, model=loaded, slots=chosen, batch_size=batch_size, seed=seed, thorough=thorough,
        each=lambda steps: bar(steps, "auditing", quiet=as_json),
    )  # fmt: skip
    if as_json:
        print(json.dumps(report.as_plain(), indent=2))
    else:
        _print(report, model)
    return 0 if report.ok else 1


def _print(report: Report, model: str | None) -> None:
    cells = [
        [
            row.check,
            row.what,
            row.figure,
            row.claim,
            Text("-" if row.verdict == "not applicable" else row.verdict, style=_STYLE[row.verdict]),
        ]
        for row in report.rows
    ]
    console().print(table(["", "what", "found", "claimed", ""], cells))
    console().print(Text("\n" + verdict_line(report, model)), soft_wrap=True)


def verdict_line(report: Report, model: str | None) -> str:
    """One sentence: how many checks hold, or which fail."""
    where = "as a mechanism" if model is None else f"through model {model}"
    apart = sum(row.verdict == "not applicable" for row in report.rows)
    held = sum(row.verdict == "pass" for row in report.rows)
    rest = f", {apart} do not apply" if apart else ""
    if report.ok:
        bare = any(row.claim == "epsilon = inf" for row in report.rows)
        claim = "; epsilon = inf, as claimed" if bare else ""
        return f"{report.policy} holds {where}: {held} checks pass{rest}{claim}."
    letters = ", ".join(dict.fromkeys(row.check for row in report.failed))
    number = len(report.failed)
    return f"{report.policy} FAILS {where}: {number} of {held + number} checks ({letters}){rest}."
