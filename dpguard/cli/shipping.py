"""``dpguard export``: the chosen policy as a folder that can be run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from dpguard.cli.console import console
from dpguard.deploy.export import export


def export_policy(
    folder: Path, to: str, *, policy: str | None, out: Path | None, metrics: Sequence[str], as_json: bool
) -> None:
    """Write the folder; print where it is, what it promises, and what must be known before it is shipped."""
    made = export(folder, to=to, policy=policy, out=out, metrics=metrics)
    budget, form = made.rehearsal.budget, made.rehearsal.message
    if as_json:
        plain = {
            "folder": str(made.folder),
            "policy": made.rehearsal.policy,
            "plan": made.rehearsal.plan.hash,
            "epsilon": "inf" if math.isinf(budget.epsilon) else budget.epsilon,
            "delta": budget.delta,
            "message": form.kind,
            "rounds": made.rehearsal.rounds,
            "warnings": list(made.warnings),
        }
        print(json.dumps(plain, indent=2))
        return
    out_ = console()
    epsilon = "inf" if math.isinf(budget.epsilon) else f"{budget.epsilon:.3g}"
    steps = f" after {form.local_steps} local steps" if form.kind == "delta" else ""
    out_.print(
        f"{made.rehearsal.policy} for {to}: a {form.kind}{steps} a round, {made.rehearsal.rounds} rounds, epsilon "
        f"{epsilon} at delta {budget.delta:g}",
        style="bold",
        markup=False,
    )
    for warning in made.warnings:
        out_.print(f"- {warning}", markup=False)
    out_.print(f"card: {made.folder / 'card.md'}", markup=False, soft_wrap=True)
    out_.print(f"next: python {quote(str(made.folder / 'self_test.py'))}", markup=False, soft_wrap=True)
